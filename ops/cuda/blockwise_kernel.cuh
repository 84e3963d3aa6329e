// The step with quantized state, and quantization alone, on the device. A warp owns a quantization block, 8 elements a
// lane; it takes the block's scales by shuffles, and nothing in its loop waits for another warp.
#pragma once

#include "../ademamix.h"
#include "../blockwise.h"
#include "approximate.cuh"
#include "lanes.cuh"
#include "multi_tensor.cuh"
#include "param_lanes.cuh"
#include "prologue.cuh"

namespace ademamix {

constexpr int WARP = 32;
constexpr int LANE_ELEMENTS = BLOCK_SIZE / WARP;
static_assert(LANE_ELEMENTS == RANDOM_GROUP, "a lane draws the bits of its elements at once");

// A fixed number of CTAs goes through all blocks, so that a tensor's scalars are loaded once per CTA.
constexpr int BLOCKWISE_THREADS = 128;
constexpr uint32_t TILE_BLOCKS = BLOCKWISE_THREADS / WARP;  // of one tensor, one for each warp

// One parameter with its gradient and quantized state; param and grad are contiguous.
struct BlockwiseRecord {
  void* param;
  const void* grad;
  int8_t* exp_avg;
  void* exp_avg_slow;
  uint8_t* exp_avg_sq;
  float* exp_avg_absmax;
  float* exp_avg_slow_absmax;
  float* exp_avg_sq_absmax;
  int16_t* remainder;  // if ParamRounding::REMAINDER
  int64_t numel;
  uint32_t blocks;
  uint32_t wide_blocks;  // the first blocks, of 256 elements and aligned for vector accesses
  int64_t stream;        // of random bits
};

// ------------------------------------------------------------------------------------------------------- a lane's part

using LaneFloats = float[LANE_ELEMENTS];

template <class Format>
using LaneCodes = Lanes<typename Format::Code, LANE_ELEMENTS>;

// The larger of two magnitudes; NaN counts as the largest.
__device__ __forceinline__ float larger_magnitude(float magnitude, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(magnitude), "f"(::fabsf(value)));
  return result;
#else
  const uint32_t a = float_bits(magnitude), b = float_bits(::fabsf(value));
  return float_from_bits(a > b ? a : b);
#endif
}

__device__ __forceinline__ float largest(const LaneFloats& values) {
  float result = ::fabsf(values[0]);
#pragma unroll
  for (int i = 1; i < LANE_ELEMENTS; ++i) result = larger_magnitude(result, values[i]);
  return result;
}

// Over the warp; of magnitudes, whose bits are in their own order, NaN above all.
__device__ __forceinline__ float warp_largest(float magnitude) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return float_from_bits(__reduce_max_sync(0xffffffff, float_bits(magnitude)));
#else
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    magnitude = larger_magnitude(magnitude, __shfl_xor_sync(0xffffffff, magnitude, distance));
  return magnitude;
#endif
}

__device__ __forceinline__ bool is_finite(float magnitude) { return magnitude <= FLT_MAX; }

template <class Format>
__device__ __forceinline__ void decode(const LaneCodes<Format>& codes, float absmax, LaneFloats& values) {
  const float unit = absmax * Format::UNIT;
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i)
    values[i] = Format::decode(static_cast<float>(codes.template get<typename Format::Code>(i)), unit);
}

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(double a) { return static_cast<float>(a); }
__device__ __forceinline__ float to_float(Approximate a) { return a.value; }

// Of finite values, for FourthRoot of their roots. V is the type of the arithmetic.
template <class Format, bool STOCHASTIC, class V>
__device__ __forceinline__ void encode(const LaneFloats& values, float inverse, const RandomKey& key, uint64_t group,
                                       LaneCodes<Format>& result) {
  uint32_t codes[LANE_ELEMENTS];
  if constexpr (STOCHASTIC) {
    const RandomWords words = random_words(key, group);
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; ++i) {
      const V position = Format::template encode<Format::POSITION_ZERO>(V(values[i]), V(inverse));
      codes[i] = Format::round(to_float(position), random_half(words, i));
    }
    result.template set_all<Format::STOCHASTIC_SHIFT>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; ++i) {
      if constexpr (std::is_same_v<Format, FourthRoot>)
        codes[i] = float_bits(to_float(Format::template encode<ROUNDING_MAGIC>(V(values[i]), V(inverse))));
      else
        codes[i] = float_bits(to_float(Format::encode(V(values[i]), V(inverse))));
    }
    result.set_all(codes);
  }
}

// ------------------------------------------------------------------------------------------------------------ the step

// For parameters of dtype P: the type of the scalars, and that of the arithmetic.
template <class P>
struct BlockwiseTypes {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  using V = std::conditional_t<std::is_same_v<P, double>, double, Approximate>;
};

// The CTAs that an SM's registers hold.
template <class P, ParamRounding ROUNDING>
constexpr int BLOCKWISE_CTAS_PER_SM = std::is_same_v<P, double>               ? 3
                                      : ROUNDING == ParamRounding::STOCHASTIC ? 4
                                                                              : 5;

__device__ __forceinline__ double to_param(double a) { return a; }
__device__ __forceinline__ float to_param(Approximate a) { return a.value; }

template <class P, class G, class Slow, bool STOCHASTIC, ParamRounding ROUNDING>
__global__ void __launch_bounds__(BLOCKWISE_THREADS, BLOCKWISE_CTAS_PER_SM<P, ROUNDING>)
    blockwise_step_kernel(const __grid_constant__ TensorTable<BlockwiseRecord> table,
                          const TensorScalars<typename BlockwiseTypes<P>::T>* scalars, uint64_t seed,
                          const float* found_inf) {
  using T = typename BlockwiseTypes<P>::T;
  using V = typename BlockwiseTypes<P>::V;
  if (skipped(found_inf)) return;
  const int lane = static_cast<int>(threadIdx.x % WARP);
  const uint32_t warp = threadIdx.x / WARP;
  uint32_t end_tile = 0, first_tile = 0;  // of the current tensor
  int32_t tensor = 0;
  StepScalars<V> s;
  RandomKey key{};
  float* absmax = nullptr;  // of the first three lanes, each has one state's scales

  for (uint32_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    if (tile >= end_tile) {
      const auto place = table.find(tile);
      tensor = place.tensor;
      first_tile = tile - place.tile;
      end_tile = table.end_tile[tensor];
      const TensorScalars<T> loaded = scalars[table.first + tensor].load();
      s = StepScalars<V>(loaded.scalars);
      const BlockwiseRecord& r = table.records[tensor];
      key = random_key(seed, loaded.step, r.stream);
      absmax = lane == 0 ? r.exp_avg_absmax : lane == 1 ? r.exp_avg_slow_absmax : r.exp_avg_sq_absmax;
    }
    const BlockwiseRecord& r = table.records[tensor];
    const uint32_t block = (tile - first_tile) * TILE_BLOCKS + warp;  // of the tensor, or past its end
    const int64_t first = static_cast<int64_t>(block) * BLOCK_SIZE + lane * LANE_ELEMENTS;
    const bool wide = block < r.wide_blocks;
    const int64_t rest = r.numel - first;
    const int count = rest < LANE_ELEMENTS ? static_cast<int>(rest) : LANE_ELEMENTS;  // below 0 past the end
    const bool has_scale = lane < 3 && block < r.blocks;
    P* const param = static_cast<P*>(r.param) + first;
    const G* const grad = static_cast<const G*>(r.grad) + first;
    int16_t* const remainder = remainder_at<ROUNDING>(r.remainder, first);
    int8_t* const m1_codes = r.exp_avg + first;
    auto* const m2_codes = static_cast<typename Slow::Code*>(r.exp_avg_slow) + first;
    uint8_t* const nu_codes = r.exp_avg_sq + first;

    ParamLanes<P, ROUNDING, LANE_ELEMENTS> p;
    Lanes<G, LANE_ELEMENTS> g;
    LaneCodes<SignedSqrt> m1_lanes;
    LaneCodes<Slow> m2_lanes;
    LaneCodes<FourthRoot> nu_lanes;
    if (wide) {
      p.load(param, remainder);
      g.load(grad);
      m1_lanes.load(m1_codes);
      m2_lanes.load(m2_codes);
      nu_lanes.load(nu_codes);
    } else {  // zeros after the end change no scale
      p.load(param, remainder, count);
      g.load(grad, count, G(0));
      m1_lanes.load(m1_codes, count, 0);
      m2_lanes.load(m2_codes, count, 0);
      nu_lanes.load(nu_codes, count, 0);
    }
    const float old_absmax = has_scale ? absmax[block] : 0;

    LaneFloats m1, m2, nu, root;
    decode<SignedSqrt>(m1_lanes, __shfl_sync(0xffffffff, old_absmax, 0), m1);
    decode<Slow>(m2_lanes, __shfl_sync(0xffffffff, old_absmax, 1), m2);
    decode<FourthRoot>(nu_lanes, __shfl_sync(0xffffffff, old_absmax, 2), nu);
    T new_param[LANE_ELEMENTS];
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; ++i) {
      Element<V> e{V(p.template get<T>(i)), V(m1[i]), V(m2[i]), V(nu[i])};
      const V sqrt_nu = update(e, V(g.template get<T>(i)), s);
      new_param[i] = to_param(e.param);
      m1[i] = to_float(e.exp_avg);
      m2[i] = to_float(e.exp_avg_slow);
      nu[i] = to_float(e.exp_avg_sq);
      // Codes are made of the root of the float32 value.
      root[i] = std::is_same_v<V, double> ? sqrt(nu[i]) : to_float(sqrt_nu);
    }
    const uint64_t group = static_cast<uint64_t>(block) * WARP + static_cast<uint32_t>(lane);
    p.set_all(new_param, key, group);
    if (wide)
      p.store(param, remainder);
    else
      p.store(param, remainder, count);

    float m1_absmax = warp_largest(largest(m1)), m2_absmax = warp_largest(largest(m2)),
          nu_absmax = warp_largest(largest(nu));
    if (!(is_finite(m1_absmax) && is_finite(m2_absmax) && is_finite(nu_absmax))) {
      // An element of which one moment isn't finite loses all three, and no more than that.
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; ++i) {
        const bool keep = is_finite(::fabsf(m1[i])) && is_finite(::fabsf(m2[i])) && is_finite(::fabsf(nu[i]));
        if (!keep) m1[i] = m2[i] = nu[i] = root[i] = 0;
      }
      m1_absmax = warp_largest(largest(m1));
      m2_absmax = warp_largest(largest(m2));
      nu_absmax = warp_largest(largest(nu));
    }
    const float new_absmax = lane == 0 ? m1_absmax : lane == 1 ? m2_absmax : sqrt(nu_absmax);
    if (has_scale) absmax[block] = new_absmax;
    const float inverse = inverse_absmax(new_absmax);
    encode<SignedSqrt, false, Approximate>(m1, __shfl_sync(0xffffffff, inverse, 0), key, group, m1_lanes);
    encode<Slow, false, Approximate>(m2, __shfl_sync(0xffffffff, inverse, 1), key, group, m2_lanes);
    encode<FourthRoot, STOCHASTIC, Approximate>(root, __shfl_sync(0xffffffff, inverse, 2), key, group, nu_lanes);
    if (wide) {
      m1_lanes.store(m1_codes);
      m2_lanes.store(m2_codes);
      nu_lanes.store(nu_codes);
    } else {
      m1_lanes.store(m1_codes, count);
      m2_lanes.store(m2_codes, count);
      nu_lanes.store(nu_codes, count);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- quantization

// To float32 and back, a block per warp.

template <class Format, bool STOCHASTIC>
__global__ void __launch_bounds__(BLOCKWISE_THREADS)
    quantize_kernel(const float* values, typename Format::Code* codes, float* absmax, int64_t numel, RandomKey key) {
  const int lane = static_cast<int>(threadIdx.x % WARP);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * TILE_BLOCKS + threadIdx.x / WARP;
  const int64_t first = block * BLOCK_SIZE + lane * LANE_ELEMENTS;
  if (first - lane * LANE_ELEMENTS >= numel) return;
  const int count = numel - first < LANE_ELEMENTS ? static_cast<int>(numel - first) : LANE_ELEMENTS;

  LaneFloats x;
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i) {
    x[i] = finite_or_zero(i < count ? values[first + i] : 0.0f);
    if constexpr (std::is_same_v<Format, FourthRoot>) x[i] = sqrt(larger(x[i], 0.0f));
  }
  const float scale = warp_largest(largest(x));
  if (lane == 0) absmax[block] = scale;
  LaneCodes<Format> lanes;
  encode<Format, STOCHASTIC, float>(x, inverse_absmax(scale), key, static_cast<uint64_t>(first / RANDOM_GROUP), lanes);
  lanes.store(codes + first, count);
}

template <class Format>
__global__ void __launch_bounds__(BLOCKWISE_THREADS)
    dequantize_kernel(const typename Format::Code* codes, const float* absmax, float* values, int64_t numel) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * BLOCKWISE_THREADS + threadIdx.x) * LANE_ELEMENTS;
  if (first >= numel) return;
  const int count = numel - first < LANE_ELEMENTS ? static_cast<int>(numel - first) : LANE_ELEMENTS;
  LaneCodes<Format> lanes;
  lanes.load(codes + first, count, 0);
  LaneFloats x;
  decode<Format>(lanes, absmax[first / BLOCK_SIZE], x);
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i)
    if (i < count) values[first + i] = x[i];
}

}  // namespace ademamix

// The step with quantized state, and quantization alone, on the device. A warp owns a quantization block, 8 elements a
// lane; it takes the block's scales by shuffles, and nothing in its loop waits for another warp.
#pragma once

#include <cfloat>
#include <type_traits>

#include "approximate.cuh"
#include "lanes.cuh"
#include "param_lanes.cuh"
#include "prologue.cuh"

namespace ademamix {

// --------------------------------------------------------------------------------------------------- a lane's elements

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

// Returns the largest magnitude of the warp. The bits of magnitudes are in the order of their values, NaN above all.
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

// `codes` may be words.
template <class Format, class Codes>
__device__ __forceinline__ void decode(const Codes& codes, float absmax, LaneFloats& values) {
  constexpr bool IN_WORDS = std::is_same_v<Format, Linear12> || !std::is_same_v<Codes, LaneCodes<Format>>;
  const float unit = absmax * Format::UNIT;
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i) {
    const int32_t word = codes.template get<int32_t>(i);
    const float code = IN_WORDS ? static_cast<float>(code_in_word<Format>(word)) : codes.get_float(i);
    values[i] = Format::decode(code, unit);
  }
}

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(double a) { return static_cast<float>(a); }
__device__ __forceinline__ float to_float(Approximate a) { return a.value; }

// Encodes finite values, for fourth-root formats their square roots: stochastically with the bits of `random`, or to
// nearest. V is the type of the arithmetic. The codes are an element's lowest bits; Code's bits above may be garbage.
template <class Format, bool STOCHASTIC, class V, class Code>
__device__ __forceinline__ void encode(const LaneFloats& values, float inverse, const RandomWords& random,
                                       Lanes<Code, LANE_ELEMENTS>& result) {
  uint32_t codes[LANE_ELEMENTS];
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i) {
    if constexpr (STOCHASTIC) {
      const V position = Format::template encode<Format::POSITION_ZERO>(V(values[i]), V(inverse));
      codes[i] =
          round_position<Format>(float_bits(to_float(position)), random_half(random, i ^ RANDOM_ELEMENT<Format>));
    } else {
      codes[i] = float_bits(to_float(Format::encode(V(values[i]), V(inverse))));
    }
  }
  result.template set_all<STOCHASTIC ? STOCHASTIC_SHIFT : 0>(codes);
}

// Words with a code of Linear12 and another one.
using LaneWords = Lanes<int16_t, LANE_ELEMENTS>;

template <class Other, bool STOCHASTIC>
__device__ __forceinline__ void encode_words(const LaneFloats& slow, float slow_inverse, const LaneFloats& others,
                                             float other_inverse, const RandomWords& random, LaneWords& result) {
  LaneWords other_words;
  encode<Linear12, false, Approximate>(slow, slow_inverse, random, result);
  encode<Other, STOCHASTIC, Approximate>(others, other_inverse, random, other_words);
  result.template append<4>(other_words);
}

// ------------------------------------------------------------------------------------------------------------ the step

// For parameters of type P, T is the type of the scalars and V the type of the arithmetic.
template <class P>
struct BlockwiseTypes {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  using V = std::conditional_t<std::is_same_v<P, double>, double, Approximate>;
};

// The CTAs that fit into an SM's registers: with more of them, more loads are in flight.
template <class P, class G, ParamRounding ROUNDING>
constexpr int blockwise_ctas_per_sm() {
  if (std::is_same_v<P, double>) return 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800  // reductions by shuffles take more
  return 4;
#else
  if (draws(ROUNDING)) return 4;
  return sizeof(P) == 2 && sizeof(G) <= 4 && ROUNDING == ParamRounding::NEAREST ? 6 : 5;
#endif
}

__device__ __forceinline__ double to_param(double a) { return a; }
__device__ __forceinline__ float to_param(Approximate a) { return a.value; }

// A lane's elements of a block, as they are in memory.
template <class P, class G, class Fast, class Slow, class Sq, ParamRounding ROUNDING>
class BlockLanes {
 public:
  static constexpr bool EXP_AVG = IS_KEPT<Fast>, IN_WORDS = std::is_same_v<Slow, Linear12>;
  static constexpr bool SQ_IN_WORDS = std::is_same_v<Sq, FourthRoot4>;
  static constexpr bool OWN_M1 = EXP_AVG && !IN_WORDS, OWN_NU = !SQ_IN_WORDS;  // else they are in m2's words
  static constexpr int SCALES = EXP_AVG ? 3 : 2;

  ParamLanes<P, ROUNDING, LANE_ELEMENTS> p;
  Lanes<G, LANE_ELEMENTS> g;
  std::conditional_t<OWN_M1, LaneCodes<Fast>, Nothing> m1;
  LaneCodes<Slow> m2;
  std::conditional_t<OWN_NU, LaneCodes<Sq>, Nothing> nu;
  float absmax;  // the first lanes have one state's each, in the record's order

  __device__ __forceinline__ const auto& m1_codes() const {
    if constexpr (OWN_M1) return m1;
    if constexpr (!OWN_M1) return m2;
  }

  __device__ __forceinline__ const auto& nu_codes() const {
    if constexpr (OWN_NU) return nu;
    if constexpr (!OWN_NU) return m2;
  }

  // `block` may be past the tensor's end.
  __device__ __forceinline__ void load(const BlockwiseRecord& r, uint32_t block, int lane) {
    const Pointers at(r, block, lane);
    if (block < r.wide_blocks) {
      p.load(at.param, at.remainder);
      if constexpr (OWN_M1) m1.load(at.m1);
      m2.load(at.m2);
      if constexpr (OWN_NU) nu.load(at.nu);
      absmax = *at.absmax;
    } else {  // zeros after the end change no scale
      const int count = Pointers::count(r, block, lane);
      p.load(at.param, at.remainder, count);
      if constexpr (OWN_M1) m1.load(at.m1, count, 0);
      m2.load(at.m2, count, 0);
      if constexpr (OWN_NU) nu.load(at.nu, count, 0);
      absmax = block < r.blocks ? *at.absmax : 0;
    }
    if (block < r.wide_grads)
      g.load(at.grad);
    else
      g.load(at.grad, Pointers::count(r, block, lane), G(0));
  }

  __device__ __forceinline__ void store(const BlockwiseRecord& r, uint32_t block, int lane) const {
    const Pointers at(r, block, lane);
    if (block < r.wide_blocks) {
      p.store(at.param, at.remainder);
      if constexpr (OWN_M1) m1.store(at.m1);
      m2.store(at.m2);
      if constexpr (OWN_NU) nu.store(at.nu);
      if (lane < SCALES) *at.absmax = absmax;
    } else {
      const int count = Pointers::count(r, block, lane);
      p.store(at.param, at.remainder, count);
      if constexpr (OWN_M1) m1.store(at.m1, count);
      m2.store(at.m2, count);
      if constexpr (OWN_NU) nu.store(at.nu, count);
      if (lane < SCALES && block < r.blocks) *at.absmax = absmax;
    }
  }

 private:
  struct Pointers {
    P* param;
    const G* grad;
    Remainder<ROUNDING>* remainder;
    int8_t* m1;
    typename Slow::Code* m2;
    uint8_t* nu;
    float* absmax;

    __device__ __forceinline__ Pointers(const BlockwiseRecord& r, uint32_t block, int lane) {
      const int64_t first = first_element(block, lane);
      param = static_cast<P*>(r.param) + first;
      grad = static_cast<const G*>(r.grad) + first;
      remainder = remainder_at<ROUNDING>(r.remainder, first);
      m1 = OWN_M1 ? r.exp_avg + first : nullptr;
      m2 = static_cast<typename Slow::Code*>(r.exp_avg_slow) + first;
      nu = OWN_NU ? r.exp_avg_sq + first : nullptr;
      absmax = r.absmaxs[lane < SCALES ? lane : SCALES - 1] + block;
    }

    // The number of the lane's elements, if they aren't accessed as vectors; below 0 past the tensor's end.
    __device__ __forceinline__ static int count(const BlockwiseRecord& r, uint32_t block, int lane) {
      asm volatile("" : "+r"(block));  // else this is computed for every block, and rarely needed
      const int64_t rest = r.numel - first_element(block, lane);
      return rest < LANE_ELEMENTS ? static_cast<int>(rest) : LANE_ELEMENTS;
    }

    __device__ __forceinline__ static int64_t first_element(uint32_t block, int lane) {
      return static_cast<int64_t>(block) * BLOCK_SIZE + lane * LANE_ELEMENTS;
    }
  };
};

template <class P, class G, class Fast, class Slow, class Sq, bool STOCHASTIC, ParamRounding ROUNDING, int CAPACITY>
__global__ void __launch_bounds__(BLOCKWISE_THREADS, blockwise_ctas_per_sm<P, G, ROUNDING>())
    blockwise_step_kernel(const __grid_constant__ TensorTable<BlockwiseRecord, CAPACITY> table,
                          const TensorScalars<typename BlockwiseTypes<P>::T>* scalars, uint64_t seed,
                          const float* found_inf) {
  using T = typename BlockwiseTypes<P>::T;
  using V = typename BlockwiseTypes<P>::V;
  using Block = BlockLanes<P, G, Fast, Slow, Sq, ROUNDING>;
  constexpr bool EXP_AVG = Block::EXP_AVG;
  const int lane = static_cast<int>(threadIdx.x % WARP);
  const uint32_t warp = threadIdx.x / WARP;

  if (skipped(found_inf)) return;
  int32_t tensor = 0;                     // whose scalars these are
  uint32_t first_tile = 0, end_tile = 0;  // the tensor's
  StepScalars<V> s;
  RandomKey key{};
  for (uint32_t tile = blockIdx.x; tile < table.tiles(); tile += gridDim.x) {
    if (tile >= end_tile) {
      const auto position = table.find(tile);
      tensor = position.tensor;
      first_tile = tile - position.tile;
      end_tile = table.end_tile[tensor];
      const TensorScalars<T> loaded = load(scalars + table.first + tensor);
      s = StepScalars<V>(loaded.scalars);
      key = random_key(seed, loaded.step, table.records[tensor].subsequence);
    }
    const BlockwiseRecord& r = table.records[tensor];
    const uint32_t block = (tile - first_tile) * TILE_BLOCKS + warp;  // or past the tensor's end
    Block lanes;
    lanes.load(r, block, lane);

    LaneFloats m1{}, m2, nu, root;
    const float old_m2_absmax = __shfl_sync(0xffffffff, lanes.absmax, 0);
    const float old_nu_absmax = __shfl_sync(0xffffffff, lanes.absmax, 1);
    const float old_m1_absmax = EXP_AVG ? __shfl_sync(0xffffffff, lanes.absmax, 2) : 0;
    decode<Slow>(lanes.m2, old_m2_absmax, m2);
    decode<Sq>(lanes.nu_codes(), old_nu_absmax, nu);
    if constexpr (EXP_AVG) decode<Fast>(lanes.m1_codes(), old_m1_absmax, m1);
    T new_param[LANE_ELEMENTS];
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; ++i) {
      Element<V> e{V(lanes.p.template get<T>(i)), V(m1[i]), V(m2[i]), V(nu[i])};
      const V scaled_root = update<EXP_AVG>(e, V(lanes.g.template get<T>(i)), s);
      new_param[i] = to_param(e.param);
      m1[i] = to_float(e.exp_avg);
      m2[i] = to_float(e.exp_avg_slow);
      nu[i] = to_float(e.exp_avg_sq);
      // The root of the float32 value is what is encoded.
      root[i] = std::is_same_v<V, double> ? sqrt(nu[i]) : to_float(scaled_root);
    }
    const uint64_t group = static_cast<uint64_t>(block) * WARP + static_cast<uint32_t>(lane);
    lanes.p.set_all(new_param, key, group);

    float m1_absmax = EXP_AVG ? warp_largest(largest(m1)) : 0, m2_absmax = warp_largest(largest(m2)),
          nu_absmax = warp_largest(largest(nu));
    if (!(is_finite(m1_absmax) && is_finite(m2_absmax) && is_finite(nu_absmax))) {
      // If a moment of an element isn't finite, the element loses all three; its neighbours lose nothing.
#pragma unroll
      for (int i = 0; i < LANE_ELEMENTS; ++i) {
        const bool keep = is_finite(::fabsf(m1[i])) && is_finite(::fabsf(m2[i])) && is_finite(::fabsf(nu[i]));
        if (!keep) m1[i] = m2[i] = nu[i] = root[i] = 0;
      }
      if (EXP_AVG) m1_absmax = warp_largest(largest(m1));
      m2_absmax = warp_largest(largest(m2));
      nu_absmax = warp_largest(largest(nu));
    }
    const float new_absmax = lane == 0 ? m2_absmax : !EXP_AVG || lane == 1 ? sqrt(nu_absmax) : m1_absmax;
    lanes.absmax = new_absmax;
    const float inverse = inverse_absmax(new_absmax);
    const float m2_inverse = __shfl_sync(0xffffffff, inverse, 0);
    const float nu_inverse = __shfl_sync(0xffffffff, inverse, 1) * (1 / ROOT_SCALE<V>);
    const float m1_inverse = EXP_AVG ? __shfl_sync(0xffffffff, inverse, 2) : 0;
    const RandomWords random = STOCHASTIC ? random_words(key, group) : RandomWords{};
    if constexpr (Block::SQ_IN_WORDS)
      encode_words<Sq, STOCHASTIC>(m2, m2_inverse, root, nu_inverse, random, lanes.m2);
    else if constexpr (Block::IN_WORDS)
      encode_words<Fast, STOCHASTIC>(m2, m2_inverse, m1, m1_inverse, random, lanes.m2);
    else
      encode<Slow, false, Approximate>(m2, m2_inverse, random, lanes.m2);
    if constexpr (Block::OWN_NU) encode<Sq, STOCHASTIC, Approximate>(root, nu_inverse, random, lanes.nu);
    if constexpr (Block::OWN_M1) encode<Fast, false, Approximate>(m1, m1_inverse, random, lanes.m1);
    lanes.store(r, block, lane);
  }
}

// ------------------------------------------------------------------------------------------------------- quantization

// Quantizes float32 values and back, a block per warp.

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
    if constexpr (IS_FOURTH_ROOT<Format>) x[i] = sqrt(larger(x[i], 0.0f));
  }
  const float scale = warp_largest(largest(x));
  if (lane == 0) absmax[block] = scale;
  const RandomWords random =
      STOCHASTIC ? random_words(key, static_cast<uint64_t>(first / RANDOM_GROUP)) : RandomWords{};
  LaneCodes<Format> lanes;
  encode<Format, STOCHASTIC, float>(x, inverse_absmax(scale), random, lanes);
  if constexpr (std::is_same_v<Format, SignedSqrt4>) {  // removes the garbage above their 4 bits
#pragma unroll
    for (int i = 0; i < LANE_ELEMENTS; ++i) lanes.set(i, code_in_word<Format>(lanes.template get<int8_t>(i)));
  }
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
  const float scale = absmax[first / BLOCK_SIZE];
#pragma unroll
  for (int i = 0; i < LANE_ELEMENTS; ++i)
    if (i < count) values[first + i] = dequantize<Format>(lanes.get_float(i), scale);
}

}  // namespace ademamix

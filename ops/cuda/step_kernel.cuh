// The 32-bit step on the device.
#pragma once

#include "../ademamix.h"
#include "lanes.cuh"
#include "multi_tensor.cuh"
#include "param_lanes.cuh"
#include "prologue.cuh"

namespace ademamix {

constexpr int STEP_THREADS = 256;
constexpr int STEP_TILE = 2048;  // elements of one CTA

// One parameter with its gradient and state, contiguous and of the kernel's dtypes.
struct StepRecord {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_slow;
  void* exp_avg_sq;
  int16_t* remainder;  // if ParamRounding::REMAINDER
  int64_t numel;
  int64_t stream;  // of random bits, if ParamRounding::STOCHASTIC
  int32_t head;    // elements before the first aligned ones; NO_ALIGNMENT where the pointers never are at once
};

constexpr int NO_ALIGNMENT = -1;

// The dtypes of a kernel: of the parameters, the gradients, and of arithmetic and state.
template <class P, class G>
struct StepTypes {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  static constexpr int SMALLEST = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  // Elements at a time: 16 bytes of the narrowest tensor, except where the others would take too many registers.
  static constexpr int WIDTH = std::is_same_v<P, double> ? (SMALLEST == 8 ? 2 : 4) : 16 / SMALLEST;
};

inline int64_t step_tiles(const StepRecord& r) {
  const int64_t rest = r.numel - (r.head > 0 ? r.head : 0);
  return r.numel == 0 ? 0 : std::max<int64_t>(1, (rest + STEP_TILE - 1) / STEP_TILE);
}

// Elements of S from p to the next address that vector accesses of the kernel may start at.
template <class S, int WIDTH>
int elements_to_alignment(const void* p) {
  constexpr uintptr_t alignment = Lanes<S, WIDTH>::ALIGNMENT;
  return static_cast<int>((alignment - reinterpret_cast<uintptr_t>(p) % alignment) % alignment / sizeof(S));
}

// The smallest number of elements after which all pointers are aligned.
template <class P, class G, ParamRounding ROUNDING>
int step_head(const StepRecord& r) {
  using Types = StepTypes<P, G>;
  using T = typename Types::T;
  constexpr int WIDTH = Types::WIDTH;
  constexpr bool GROUPED = ROUNDING == ParamRounding::STOCHASTIC;  // the elements from 0 on share random words
  for (int head = 0; head < (GROUPED ? 1 : WIDTH); ++head) {
    if (elements_to_alignment<P, WIDTH>(static_cast<const P*>(r.param) + head) == 0 &&
        elements_to_alignment<G, WIDTH>(static_cast<const G*>(r.grad) + head) == 0 &&
        elements_to_alignment<T, WIDTH>(static_cast<const T*>(r.exp_avg) + head) == 0 &&
        elements_to_alignment<T, WIDTH>(static_cast<const T*>(r.exp_avg_slow) + head) == 0 &&
        elements_to_alignment<T, WIDTH>(static_cast<const T*>(r.exp_avg_sq) + head) == 0 &&
        (ROUNDING != ParamRounding::REMAINDER || elements_to_alignment<int16_t, WIDTH>(r.remainder + head) == 0))
      return static_cast<int>(std::min<int64_t>(head, r.numel));
  }
  return NO_ALIGNMENT;
}

// The elements of one tile, by their pointers to its first.
template <class P, class G, ParamRounding ROUNDING>
struct StepTile {
  using Types = StepTypes<P, G>;
  using T = typename Types::T;
  static constexpr int WIDTH = Types::WIDTH;

  P* param;
  const G* grad;
  T* exp_avg;
  T* exp_avg_slow;
  T* exp_avg_sq;
  int16_t* remainder;
  RandomKey key;
  int64_t begin;

  __device__ StepTile(const StepRecord& r, int64_t first, const RandomKey& random)
      : param(static_cast<P*>(r.param) + first),
        grad(static_cast<const G*>(r.grad) + first),
        exp_avg(static_cast<T*>(r.exp_avg) + first),
        exp_avg_slow(static_cast<T*>(r.exp_avg_slow) + first),
        exp_avg_sq(static_cast<T*>(r.exp_avg_sq) + first),
        remainder(remainder_at<ROUNDING>(r.remainder, first)),
        key(random),
        begin(first) {}

  __device__ __forceinline__ void update_one(int i, const StepScalars<T>& s) const {
    int16_t* const rest = remainder_at<ROUNDING>(remainder, i);
    Element<T> e{load_weight<ROUNDING, T>(param + i, rest), exp_avg[i], exp_avg_slow[i], exp_avg_sq[i]};
    update(e, static_cast<T>(grad[i]), s);
    store_weight<ROUNDING>(e.param, param + i, rest, key, begin + i);
    exp_avg[i] = e.exp_avg;
    exp_avg_slow[i] = e.exp_avg_slow;
    exp_avg_sq[i] = e.exp_avg_sq;
  }

  __device__ __forceinline__ void update_lanes(int i, const StepScalars<T>& s) const {
    ParamLanes<P, ROUNDING, WIDTH> p;
    Lanes<G, WIDTH> g;
    Lanes<T, WIDTH> m1, m2, nu;
    p.load(param + i, remainder_at<ROUNDING>(remainder, i));
    g.load(grad + i);
    m1.load(exp_avg + i);
    m2.load(exp_avg_slow + i);
    nu.load(exp_avg_sq + i);
    T weights[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      Element<T> e{p.template get<T>(j), m1.template get<T>(j), m2.template get<T>(j), nu.template get<T>(j)};
      update(e, g.template get<T>(j), s);
      weights[j] = e.param;
      m1.set(j, e.exp_avg);
      m2.set(j, e.exp_avg_slow);
      nu.set(j, e.exp_avg_sq);
    }
    p.set_all(weights, key, static_cast<uint64_t>(begin + i) / RANDOM_GROUP);
    p.store(param + i, remainder_at<ROUNDING>(remainder, i));
    m1.store(exp_avg + i);
    m2.store(exp_avg_slow + i);
    nu.store(exp_avg_sq + i);
  }
};

template <class P, class G, ParamRounding ROUNDING>
__global__ void __launch_bounds__(STEP_THREADS)
    step_kernel(const __grid_constant__ TensorTable<StepRecord> table,
                const TensorScalars<typename StepTypes<P, G>::T>* scalars, uint64_t seed, const float* found_inf) {
  constexpr int WIDTH = StepTypes<P, G>::WIDTH;
  if (skipped(found_inf)) return;
  const auto place = table.find(blockIdx.x);
  const StepRecord& record = table.records[place.tensor];
  const auto loaded = scalars[table.first + place.tensor].load();
  const auto& s = loaded.scalars;
  const int thread = static_cast<int>(threadIdx.x);

  const int head = static_cast<int>(record.head);
  const int64_t begin = static_cast<int64_t>(place.tile) * STEP_TILE + (head > 0 ? head : 0);
  const int64_t rest = record.numel - begin;
  const int count = rest < STEP_TILE ? static_cast<int>(rest) : STEP_TILE;
  const int in_lanes = head == NO_ALIGNMENT ? 0 : count / WIDTH * WIDTH;
  const StepTile<P, G, ROUNDING> tile(record, begin, random_key(seed, loaded.step, record.stream));
  for (int i = thread * WIDTH; i < in_lanes; i += STEP_THREADS * WIDTH) tile.update_lanes(i, s);
#pragma unroll 1  // seldom run
  for (int i = in_lanes + thread; i < count; i += STEP_THREADS) tile.update_one(i, s);
  if (place.tile == 0 && thread < head) tile.update_one(thread - head, s);
}

}  // namespace ademamix

// The 32-bit step on the device.
#pragma once

#include <type_traits>

#include "lanes.cuh"
#include "param_lanes.cuh"
#include "prologue.cuh"

namespace ademamix {

// The dtypes of a kernel: of the parameters, the gradients, and of arithmetic and state.
template <class P, class G>
struct StepTypes {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  static constexpr int WIDTH = step_width(sizeof(P), sizeof(G));
};

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
  bool wide_grad;

  __device__ StepTile(const StepRecord& r, int64_t first, const RandomKey& random)
      : param(static_cast<P*>(r.param) + first),
        grad(static_cast<const G*>(r.grad) + first),
        exp_avg(static_cast<T*>(r.exp_avg) + first),
        exp_avg_slow(static_cast<T*>(r.exp_avg_slow) + first),
        exp_avg_sq(static_cast<T*>(r.exp_avg_sq) + first),
        remainder(remainder_at<ROUNDING>(r.remainder, first)),
        key(random),
        begin(first),
        wide_grad(r.wide_grad) {}

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
    if (wide_grad)
      g.load(grad + i);
    else
      g.load(grad + i, WIDTH, G(0));
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

template <class P, class G, ParamRounding ROUNDING, int CAPACITY>
__global__ void __launch_bounds__(STEP_THREADS)
    step_kernel(const __grid_constant__ TensorTable<StepRecord, CAPACITY> table,
                const TensorScalars<typename StepTypes<P, G>::T>* scalars, uint64_t seed, const float* found_inf) {
  constexpr int WIDTH = StepTypes<P, G>::WIDTH;
  if (skipped(found_inf)) return;
  const auto place = table.find(blockIdx.x);
  const StepRecord& record = table.records[place.tensor];
  const auto loaded = load(scalars + table.first + place.tensor);
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

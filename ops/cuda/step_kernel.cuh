// The 32-bit step on the device.
#pragma once

#include <type_traits>

#include "lanes.cuh"
#include "param_lanes.cuh"
#include "prologue.cuh"

namespace ademamix {

// T is the type of arithmetic and state for parameters of type P and gradients of type G.
template <class P, class G>
struct StepTypes {
  using T = std::conditional_t<std::is_same_v<P, double>, double, float>;
  static constexpr int WIDTH = step_width(sizeof(P), sizeof(G));
};

// The elements of one tile: pointers to its first. EXP_AVG: whether there is exp_avg.
template <class P, class G, bool EXP_AVG, ParamRounding ROUNDING>
struct StepTile {
  using Types = StepTypes<P, G>;
  using T = typename Types::T;
  static constexpr int WIDTH = Types::WIDTH;

  P* param;
  const G* grad;
  T* exp_avg;
  T* exp_avg_slow;
  T* exp_avg_sq;
  Remainder<ROUNDING>* remainder;
  int64_t begin;
  bool wide_grad;

  __device__ StepTile(const StepRecord& r, int64_t first)
      : param(static_cast<P*>(r.param) + first),
        grad(static_cast<const G*>(r.grad) + first),
        exp_avg(EXP_AVG ? static_cast<T*>(r.exp_avg) + first : nullptr),
        exp_avg_slow(static_cast<T*>(r.exp_avg_slow) + first),
        exp_avg_sq(static_cast<T*>(r.exp_avg_sq) + first),
        remainder(remainder_at<ROUNDING>(r.remainder, first)),
        begin(first),
        wide_grad(r.wide_grad) {}

  __device__ __forceinline__ void update_one(int i, const StepScalars<T>& s, const RandomKey& key) const {
    Remainder<ROUNDING>* const rest = remainder_at<ROUNDING>(remainder, i);
    Element<T> e{load_weight<ROUNDING, T>(param + i, rest), EXP_AVG ? exp_avg[i] : T(0), exp_avg_slow[i],
                 exp_avg_sq[i]};
    update<EXP_AVG>(e, static_cast<T>(grad[i]), s);
    store_weight<ROUNDING>(e.param, param + i, rest, key, begin + i);
    if constexpr (EXP_AVG) exp_avg[i] = e.exp_avg;
    exp_avg_slow[i] = e.exp_avg_slow;
    exp_avg_sq[i] = e.exp_avg_sq;
  }
};

// The elements that a thread has in registers.
template <class P, class G, bool EXP_AVG, ParamRounding ROUNDING>
class StepLanes {
  using Types = StepTypes<P, G>;
  using T = typename Types::T;
  static constexpr int WIDTH = Types::WIDTH;
  using Tile = StepTile<P, G, EXP_AVG, ROUNDING>;

 public:
  __device__ __forceinline__ void load(const Tile& tile, int i) {
    p_.load(tile.param + i, remainder_at<ROUNDING>(tile.remainder, i));
    if (tile.wide_grad)
      g_.load(tile.grad + i);
    else
      g_.load(tile.grad + i, WIDTH, G(0));
    if constexpr (EXP_AVG) m1_.load(tile.exp_avg + i);
    m2_.load(tile.exp_avg_slow + i);
    nu_.load(tile.exp_avg_sq + i);
  }

  __device__ __forceinline__ void update_and_store(const Tile& tile, int i, const StepScalars<T>& s,
                                                   const RandomKey& key) {
    T weights[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      Element<T> e{p_.template get<T>(j), T(0), m2_.template get<T>(j), nu_.template get<T>(j)};
      if constexpr (EXP_AVG) e.exp_avg = m1_.template get<T>(j);
      update<EXP_AVG>(e, g_.template get<T>(j), s);
      weights[j] = e.param;
      if constexpr (EXP_AVG) m1_.set(j, e.exp_avg);
      m2_.set(j, e.exp_avg_slow);
      nu_.set(j, e.exp_avg_sq);
    }
    p_.set_all(weights, key, static_cast<uint64_t>(tile.begin + i) / RANDOM_GROUP);
    p_.store(tile.param + i, remainder_at<ROUNDING>(tile.remainder, i));
    if constexpr (EXP_AVG) m1_.store(tile.exp_avg + i);
    m2_.store(tile.exp_avg_slow + i);
    nu_.store(tile.exp_avg_sq + i);
  }

 private:
  ParamLanes<P, ROUNDING, WIDTH> p_;
  Lanes<G, WIDTH> g_;
  std::conditional_t<EXP_AVG, Lanes<T, WIDTH>, Nothing> m1_;
  Lanes<T, WIDTH> m2_, nu_;
};

template <class P, class G, bool EXP_AVG, ParamRounding ROUNDING, int CAPACITY>
__global__ void __launch_bounds__(STEP_THREADS)
    step_kernel(const __grid_constant__ TensorTable<StepRecord, CAPACITY> table,
                const TensorScalars<typename StepTypes<P, G>::T>* scalars, uint64_t seed, const float* found_inf) {
  constexpr int WIDTH = StepTypes<P, G>::WIDTH;
  constexpr int STRIDE = STEP_THREADS * WIDTH;
  const auto position = table.find(blockIdx.x);
  const StepRecord& record = table.records[position.tensor];
  const int thread = static_cast<int>(threadIdx.x);

  const int head = static_cast<int>(record.head);
  const int64_t begin = static_cast<int64_t>(position.tile) * STEP_TILE + (head > 0 ? head : 0);
  const int64_t rest = record.numel - begin;
  const int count = rest < STEP_TILE ? static_cast<int>(rest) : STEP_TILE;
  const int in_lanes = head == NO_ALIGNMENT ? 0 : count / WIDTH * WIDTH;
  const StepTile<P, G, EXP_AVG, ROUNDING> tile(record, begin);

  // Loads are issued before anything waits for them, and the next ones while these are used.
  StepLanes<P, G, EXP_AVG, ROUNDING> lanes;
  int i = thread * WIDTH;
  if (i < in_lanes) lanes.load(tile, i);
  const auto loaded = load(scalars + table.first + position.tensor);
  if (skipped(found_inf)) return;
  const auto& s = loaded.scalars;
  const RandomKey key = random_key(seed, loaded.step, record.subsequence);
#pragma unroll
  for (int done = 0; done < STEP_TILE; done += STRIDE, i += STRIDE) {
    StepLanes<P, G, EXP_AVG, ROUNDING> next;
    if (done + STRIDE < STEP_TILE && i + STRIDE < in_lanes) next.load(tile, i + STRIDE);
    if (i < in_lanes) lanes.update_and_store(tile, i, s, key);
    lanes = next;
  }
#pragma unroll 1  // seldom run
  for (int j = in_lanes + thread; j < count; j += STEP_THREADS) tile.update_one(j, s, key);
  if (position.tile == 0 && thread < head) tile.update_one(thread - head, s, key);
}

}  // namespace ademamix

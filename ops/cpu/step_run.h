#pragma once

#include "../ademamix.h"
#include "simd.h"

namespace ademamix {

// One step of n elements that lie one after another. EXP_AVG: whether there is exp_avg.
template <bool EXP_AVG, class T>
inline void step_run(T* param, const T* grad, T* exp_avg, T* exp_avg_slow, T* exp_avg_sq, int64_t n,
                     const StepScalars<T>& scalars) {
  using V = Simd<T>;
  const StepScalars<V> s(scalars);
  int64_t i = 0;
  for (; i + V::SIZE <= n; i += V::SIZE) {
    Element<V> e{V::load(param + i), EXP_AVG ? V::load(exp_avg + i) : V{}, V::load(exp_avg_slow + i),
                 V::load(exp_avg_sq + i)};
    update<EXP_AVG>(e, V::load(grad + i), s);
    e.param.store(param + i);
    if constexpr (EXP_AVG) e.exp_avg.store(exp_avg + i);
    e.exp_avg_slow.store(exp_avg_slow + i);
    e.exp_avg_sq.store(exp_avg_sq + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    Element<V> e{V::load(param + i, rest), EXP_AVG ? V::load(exp_avg + i, rest) : V{}, V::load(exp_avg_slow + i, rest),
                 V::load(exp_avg_sq + i, rest)};
    update<EXP_AVG>(e, V::load(grad + i, rest), s);
    e.param.store(param + i, rest);
    if constexpr (EXP_AVG) e.exp_avg.store(exp_avg + i, rest);
    e.exp_avg_slow.store(exp_avg_slow + i, rest);
    e.exp_avg_sq.store(exp_avg_sq + i, rest);
  }
}

}  // namespace ademamix

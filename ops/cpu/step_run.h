#pragma once

#include "../ademamix.h"
#include "simd.h"

namespace ademamix {

// One step of n elements that lie one after another.
template <class T>
inline void step_run(T* param, const T* grad, T* exp_avg, T* exp_avg_slow, T* exp_avg_sq, int64_t n,
                     const StepScalars<T>& scalars) {
  using V = Simd<T>;
  const StepScalars<V> s(scalars);
  int64_t i = 0;
  for (; i + V::SIZE <= n; i += V::SIZE) {
    Element<V> e{V::load(param + i), V::load(exp_avg + i), V::load(exp_avg_slow + i), V::load(exp_avg_sq + i)};
    update(e, V::load(grad + i), s);
    e.param.store(param + i);
    e.exp_avg.store(exp_avg + i);
    e.exp_avg_slow.store(exp_avg_slow + i);
    e.exp_avg_sq.store(exp_avg_sq + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    Element<V> e{V::load(param + i, rest), V::load(exp_avg + i, rest), V::load(exp_avg_slow + i, rest),
                 V::load(exp_avg_sq + i, rest)};
    update(e, V::load(grad + i, rest), s);
    e.param.store(param + i, rest);
    e.exp_avg.store(exp_avg + i, rest);
    e.exp_avg_slow.store(exp_avg_slow + i, rest);
    e.exp_avg_sq.store(exp_avg_sq + i, rest);
  }
}

}  // namespace ademamix

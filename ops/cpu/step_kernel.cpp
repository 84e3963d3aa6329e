#include "step_kernel.h"

#include "simd.h"
#include "staging.h"

namespace ademamix {
namespace {

template <class T>
void step_run(T* param, const T* grad, T* exp_avg, T* exp_avg_slow, T* exp_avg_sq, int64_t n,
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

}  // namespace

template <class T>
void step_elements(const StepTensor<T>& t, int64_t begin, int64_t end) {
  for (; begin < end; begin += RUN) {
    const int64_t n = std::min(RUN, end - begin);
    Run<T> param(t.param, begin, n), grad(t.grad, begin, n);
    Run<T> exp_avg(t.exp_avg, begin, n), exp_avg_slow(t.exp_avg_slow, begin, n), exp_avg_sq(t.exp_avg_sq, begin, n);
    step_run(param.data(), grad.data(), exp_avg.data(), exp_avg_slow.data(), exp_avg_sq.data(), n, t.scalars);
    param.write_back();
    exp_avg.write_back();
    exp_avg_slow.write_back();
    exp_avg_sq.write_back();
  }
}

template void step_elements(const StepTensor<float>&, int64_t, int64_t);
template void step_elements(const StepTensor<double>&, int64_t, int64_t);

}  // namespace ademamix

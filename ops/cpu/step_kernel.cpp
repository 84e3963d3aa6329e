#include "step_kernel.h"

#include "step_run.h"
#include "weights.h"

namespace ademamix {

template <class T>
void step_elements(const StepTensor<T>& t, int64_t begin, int64_t end) {
  bool staged = false;
  for (const TensorView* e : {&t.param.tensor, &t.grad, &t.exp_avg, &t.exp_avg_slow, &t.exp_avg_sq})
    staged |= !Run<T>::lies_in_memory(*e);
  const int64_t length = staged ? RUN : end - begin;
  for (; begin < end; begin += length) {
    const int64_t n = std::min(length, end - begin);
    Weights<T> param(t.param, begin, n);
    Run<T> grad(t.grad, begin, n);
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

// The 32-bit step on the CPU.
#include <optional>

#include "chunk.h"
#include "kernels.h"
#include "weights.h"

namespace ademamix {
namespace {

template <class T, bool EXP_AVG>
void step_elements(const StepTensor<T>& t, int64_t begin, int64_t end) {
  bool staged = false;
  for (const TensorView* e : {&t.param.tensor, &t.grad, &t.exp_avg, &t.exp_avg_slow, &t.exp_avg_sq})
    staged |= !Chunk<T>::is_in_place(*e);
  const int64_t length = staged ? CHUNK : end - begin;
  for (; begin < end; begin += length) {
    const int64_t n = std::min(length, end - begin);
    Weights<T> param(t.param, begin, n);
    Chunk<T> grad(t.grad, begin, n);
    std::optional<Chunk<T>> exp_avg;
    if constexpr (EXP_AVG) exp_avg.emplace(t.exp_avg, begin, n);
    Chunk<T> exp_avg_slow(t.exp_avg_slow, begin, n), exp_avg_sq(t.exp_avg_sq, begin, n);
    step_chunk<EXP_AVG>(param.data(), grad.data(), EXP_AVG ? exp_avg->data() : nullptr, exp_avg_slow.data(),
                        exp_avg_sq.data(), n, t.scalars);
    param.write_back();
    if constexpr (EXP_AVG) exp_avg->write_back();
    exp_avg_slow.write_back();
    exp_avg_sq.write_back();
  }
}

}  // namespace

template <class T>
void step_elements(const StepTensor<T>& t, int64_t begin, int64_t end) {
  t.has_exp_avg ? step_elements<T, true>(t, begin, end) : step_elements<T, false>(t, begin, end);
}

template void step_elements(const StepTensor<float>&, int64_t, int64_t);
template void step_elements(const StepTensor<double>&, int64_t, int64_t);

}  // namespace ademamix

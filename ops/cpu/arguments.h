// From an op's arguments to what the CPU kernels take.
#pragma once

#include <optional>
#include <vector>

#include "../ademamix.h"
#include "../tensor_view.h"
#include "param.h"

namespace ademamix {

inline double read_scalar(double value) { return value; }

inline double read_scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

// Where the tensors of one parameter fill their memory without gaps and in one order, as a transposed weight and its
// state do, that order serves as well as the row-major one: marks them contiguous.
inline void use_common_order(std::initializer_list<TensorView*> tensors) {
  const TensorView& first = **tensors.begin();
  if (!fills_memory(first)) return;
  for (const TensorView* t : tensors)
    if (!same_strides(first, *t)) return;
  for (TensorView* t : tensors) t->contiguous = true;
}

inline ParamRounding param_rounding(const std::vector<TensorView>& remainders, bool stochastic) {
  return stochastic           ? ParamRounding::STOCHASTIC
         : remainders.empty() ? ParamRounding::NEAREST
                              : ParamRounding::REMAINDER;
}

// The random bits of one parameter's step, after its increment.
inline RandomKey random_key(int64_t seed, const TensorView& step, int64_t stream) {
  return random_key(static_cast<uint64_t>(seed), static_cast<uint32_t>(*static_cast<const float*>(step.data)), stream);
}

// Advances each parameter's step and computes its scalars. Parameters of one step share them.
template <class T>
std::vector<StepScalars<T>> advance(const std::vector<TensorView>& steps, const Hyperparameters& h, double lr,
                                    double grad_scale) {
  std::vector<StepScalars<T>> scalars(steps.size());
  float last = 0;  // no step is 0 after its increment
  for (size_t i = 0; i < steps.size(); ++i) {
    float& step = *static_cast<float*>(steps[i].data);
    step += 1;
    scalars[i] = i > 0 && step == last ? scalars[i - 1] : StepScalars<T>(h, step, lr, grad_scale);
    last = step;
  }
  return scalars;
}

}  // namespace ademamix

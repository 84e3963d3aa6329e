// From an op's arguments to what the CPU kernels take.
#pragma once

#include <vector>

#include "../ademamix.h"
#include "../step_arguments.h"
#include "param.h"

namespace ademamix {

// The first element.
inline double read_scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

inline double read_lr(const StepOptions& options) {
  const Tensor* tensor = std::get_if<Tensor>(&options.lr);
  return tensor ? read_scalar(*tensor) : std::get<double>(options.lr);
}

inline Hyperparameters read_hyperparameters(const StepOptions& options) {
  const Tensor* tensor = std::get_if<Tensor>(&options.hyperparameters);
  if (!tensor) return std::get<Hyperparameters>(options.hyperparameters);
  const void* data = tensor->const_data_ptr();
  return tensor->scalar_type() == ScalarType::Double
             ? read_hyperparameters(static_cast<const double*>(data), options.maximize)
             : read_hyperparameters(static_cast<const float*>(data), options.maximize);
}

inline bool skipped(const StepOptions& options) {
  return options.dry_run || (options.found_inf && read_scalar(*options.found_inf) != 0);
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
std::vector<StepScalars<T>> advance(const std::vector<TensorView>& steps, const StepOptions& options) {
  const Hyperparameters h = read_hyperparameters(options);
  const double lr = read_lr(options), grad_scale = options.grad_scale ? read_scalar(*options.grad_scale) : 1;
  std::vector<StepScalars<T>> scalars(steps.size());
  float last = 0;  // no step is 0 after its increment
  for (size_t i = 0; i < steps.size(); ++i) {
    float& step = *static_cast<float*>(steps[i].data);
    step = next_step(step);
    scalars[i] = i > 0 && step == last ? scalars[i - 1] : StepScalars<T>(h, step, lr, grad_scale);
    last = step;
  }
  return scalars;
}

}  // namespace ademamix

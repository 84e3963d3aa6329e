// Turns an op's arguments into those of the CPU kernels.
#pragma once

#include <vector>

#include "../ademamix.h"
#include "../step_arguments.h"
#include "kernels.h"

namespace ademamix {

// Reads the first element.
inline double read_scalar(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.const_data_ptr())
                                               : *static_cast<const float*>(t.const_data_ptr());
}

template <class S>
std::vector<Hyperparameters> read_rows(const S* numbers, int64_t count) {
  std::vector<Hyperparameters> rows;
  for (int64_t i = 0; i < count; ++i) rows.push_back(read_hyperparameters(numbers + i * HYPERPARAMETERS));
  return rows;
}

inline std::vector<Hyperparameters> read_rows(const StepOptions& options) {
  if (const Tensor* tensor = std::get_if<Tensor>(&options.hyperparameters)) {
    const void* data = tensor->const_data_ptr();
    return tensor->scalar_type() == ScalarType::Double ? read_rows(static_cast<const double*>(data), tensor->size(0))
                                                       : read_rows(static_cast<const float*>(data), tensor->size(0));
  }
  const auto& given = std::get<NumberRows>(options.hyperparameters);
  std::vector<Hyperparameters> rows = read_rows(given.numbers.data(), static_cast<int64_t>(given.count()));
  for (size_t i = 0; i < given.lrs.size(); ++i) rows[i].lr = read_scalar(given.lrs[i]);
  return rows;
}

inline bool skipped(const StepOptions& options) {
  return options.dry_run || (options.found_inf && read_scalar(*options.found_inf) != 0);
}

// If the tensors of one parameter fill their memory without gaps and in one order, as a transposed weight and its state
// do, that order is as good as the row-major one: marks them contiguous.
inline void use_common_order(std::initializer_list<TensorView*> tensors) {
  const TensorView& first = **tensors.begin();
  if (!fills_memory(first)) return;
  for (const TensorView* t : tensors)
    if (!same_strides(first, *t)) return;
  for (TensorView* t : tensors) t->contiguous = true;
}

// The key of one parameter's random bits; `step` has been incremented.
inline RandomKey random_key(int64_t seed, const TensorView& step, int64_t subsequence) {
  const auto count = static_cast<uint32_t>(*static_cast<const float*>(step.data));
  return random_key(static_cast<uint64_t>(seed), count, subsequence);
}

// Advances each parameter's step and computes its scalars. Parameters of one row and step share them.
template <class T>
std::vector<StepScalars<T>> advance(const std::vector<TensorView>& steps, const StepOptions& options) {
  const std::vector<Hyperparameters> rows = read_rows(options);
  const double factor = grad_factor(options.maximize, options.grad_scale ? read_scalar(*options.grad_scale) : 1);
  struct Latest {
    float step = 0;  // no step is 0 after its increment
    size_t param;
  };
  std::vector<Latest> latest(rows.size());  // parameter of each row
  std::vector<StepScalars<T>> scalars(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    float& step = *static_cast<float*>(steps[i].data);
    step = next_step(step);
    const size_t row = options.row_of(i);
    scalars[i] = step == latest[row].step ? scalars[latest[row].param] : StepScalars<T>(rows[row], step, factor);
    latest[row] = {step, i};
  }
  return scalars;
}

}  // namespace ademamix

#pragma once

#include "../ademamix.h"
#include "param.h"

namespace ademamix {

// One parameter of a 32-bit step. T is the type of the arithmetic and of the state: float, or double for float64.
template <class T>
struct StepTensor {
  Param param;
  TensorView grad, exp_avg, exp_avg_slow, exp_avg_sq;
  StepScalars<T> scalars;
  bool has_exp_avg;  // else exp_avg is any tensor of the parameter's shape
};

// Updates the elements [begin, end); `begin` is a multiple of BLOCK_SIZE.
template <class T>
void step_elements(const StepTensor<T>& tensor, int64_t begin, int64_t end);

}  // namespace ademamix

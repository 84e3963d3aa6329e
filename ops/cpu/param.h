#pragma once

#include "../bfloat16.h"
#include "../view.h"

namespace ademamix {

struct Param {
  TensorView tensor;
  ParamRounding rounding;
  TensorView remainder;  // if ParamRounding::REMAINDER
  RandomKey random;      // if ParamRounding::STOCHASTIC
};

}  // namespace ademamix

#pragma once

#include "../bfloat16.h"
#include "../view.h"

namespace ademamix {

struct Param {
  TensorView tensor;
  ParamRounding rounding;
  TensorView remainder;  // if has_remainder(rounding)
  RandomKey random;      // if draws(rounding)
};

}  // namespace ademamix

#pragma once

#include "../ademamix.h"
#include "../blockwise.h"
#include "param.h"

namespace ademamix {

// A tensor in one of the formats of ../blockwise.h.
struct Quantized {
  void* codes;
  float* absmax;
  BlockFormat format;
  bool in_words;  // the codes are in words of two codes each
};

// One parameter of a step with quantized state. T is the type of the arithmetic: float, or double for float64.
template <class T>
struct BlockwiseTensor {
  Param param;
  TensorView grad;
  Quantized exp_avg;  // has no codes if it isn't kept
  Quantized exp_avg_slow, exp_avg_sq;
  StepScalars<T> scalars;
  RandomKey random;
  bool stochastic_rounding;  // of exp_avg_sq
};

// In the following `begin` is a multiple of BLOCK_SIZE, and `end` is one or the tensor's end.

// Updates the elements [begin, end).
template <class T>
void blockwise_step_elements(const BlockwiseTensor<T>& tensor, int64_t begin, int64_t end);

// Rounds to nearest, or, where there are random bits, stochastically; what is not finite is stored as 0.
void quantize_elements(const float* values, const Quantized& target, const RandomKey* random, int64_t begin,
                       int64_t end);

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end);

}  // namespace ademamix

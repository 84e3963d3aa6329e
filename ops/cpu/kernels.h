// The kernels of each instruction set, which step.cpp and blockwise.cpp call for ranges of elements [begin, end);
// `begin` is a multiple of BLOCK_SIZE.
#pragma once

#include "../ademamix.h"
#include "../bfloat16.h"
#include "../blockwise.h"
#include "../view.h"

namespace ademamix {

struct Param {
  TensorView tensor;
  ParamRounding rounding;
  TensorView remainder;  // if has_remainder(rounding)
  RandomKey random;      // if draws(rounding)
};

// One parameter of a 32-bit step. T is the type of the arithmetic and of the state: float, or double for float64.
template <class T>
struct StepTensor {
  Param param;
  TensorView grad, exp_avg, exp_avg_slow, exp_avg_sq;
  StepScalars<T> scalars;
  bool has_exp_avg;  // else exp_avg is any tensor of the parameter's shape
};

// Updates the elements [begin, end).
template <class T>
void step_elements(const StepTensor<T>& tensor, int64_t begin, int64_t end);

// A quantized tensor (../blockwise.h).
struct Quantized {
  void* codes;
  float* absmax;
  BlockFormat format;
  bool in_words;  // whether the codes are in words of two codes each
};

// One parameter of a step with quantized state. T is the type of the arithmetic: float, or double for float64.
template <class T>
struct BlockwiseTensor {
  Param param;
  TensorView grad;
  Quantized exp_avg;  // without codes if there is none
  Quantized exp_avg_slow, exp_avg_sq;
  StepScalars<T> scalars;
  RandomKey random;
  bool stochastic_rounding;  // of exp_avg_sq
};

// Updates the elements [begin, end), where `end` is a multiple of BLOCK_SIZE or the tensor's end, as in what follows.
template <class T>
void blockwise_step_elements(const BlockwiseTensor<T>& tensor, int64_t begin, int64_t end);

// Rounds stochastically if there are random bits, else to nearest. Values that aren't finite are stored as 0.
void quantize_elements(const float* values, const Quantized& target, const RandomKey* random, int64_t begin,
                       int64_t end);

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end);

}  // namespace ademamix

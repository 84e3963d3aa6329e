#include "blockwise_kernel.h"

#include "blockwise_simd.h"
#include "staging.h"
#include "step_run.h"

namespace ademamix {
namespace {

// `first` is the number of the block's first element.
void decode(const Quantized& source, int64_t first, int count, float* values) {
  const float absmax = source.absmax[first / BLOCK_SIZE];
  switch (source.format) {
    case BlockFormat::SIGNED_DYNAMIC:
      return decode_block<true>(static_cast<const uint8_t*>(source.codes) + first, absmax, count, values);
    case BlockFormat::UNSIGNED_DYNAMIC:
      return decode_block<false>(static_cast<const uint8_t*>(source.codes) + first, absmax, count, values);
    case BlockFormat::LINEAR_INT16:
      return decode_linear_block(static_cast<const int16_t*>(source.codes) + first, absmax, count, values);
  }
}

// Sets what is not finite among the values to 0.
void encode(float* values, int64_t first, int count, const RandomKey* random, const Quantized& target) {
  const float absmax = clean_and_absmax(values, count);
  target.absmax[first / BLOCK_SIZE] = absmax;
  switch (target.format) {
    case BlockFormat::SIGNED_DYNAMIC:
      return encode_signed_block(values, absmax, count, static_cast<uint8_t*>(target.codes) + first);
    case BlockFormat::UNSIGNED_DYNAMIC: {
      uint8_t* codes = static_cast<uint8_t*>(target.codes) + first;
      return random ? encode_unsigned_block_stochastic(values, absmax, count, *random, first, codes)
                    : encode_unsigned_block(values, absmax, count, codes);
    }
    case BlockFormat::LINEAR_INT16:
      return encode_linear_block(values, absmax, count, static_cast<int16_t*>(target.codes) + first);
  }
}

// An element of which one moment isn't finite loses all three, and no more than that.
void zero_where_not_finite(float* m1, float* m2, float* nu, int count) {
  constexpr uint32_t MAGNITUDE = 0x7fffffff, INFINITE = 0x7f800000;
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    const uint32_t a = float_bits(m1[i]) & MAGNITUDE, b = float_bits(m2[i]) & MAGNITUDE;
    largest = std::max(largest, std::max(std::max(a, b), float_bits(nu[i]) & MAGNITUDE));
  }
  if (largest < INFINITE) return;
  for (int i = 0; i < count; ++i)
    if (!(std::isfinite(m1[i]) && std::isfinite(m2[i]) && std::isfinite(nu[i]))) m1[i] = m2[i] = nu[i] = 0;
}

void step_block(float* param, const float* grad, float (&m1)[BLOCK_SIZE], float (&m2)[BLOCK_SIZE],
                float (&nu)[BLOCK_SIZE], int count, const StepScalars<float>& scalars) {
  step_run(param, grad, m1, m2, nu, count, scalars);
}

void step_block(double* param, const double* grad, float (&m1)[BLOCK_SIZE], float (&m2)[BLOCK_SIZE],
                float (&nu)[BLOCK_SIZE], int count, const StepScalars<double>& scalars) {
  double moments[3][BLOCK_SIZE];
  at::vec::convert(m1, moments[0], count);
  at::vec::convert(m2, moments[1], count);
  at::vec::convert(nu, moments[2], count);
  step_run(param, grad, moments[0], moments[1], moments[2], count, scalars);
  at::vec::convert(moments[0], m1, count);
  at::vec::convert(moments[1], m2, count);
  at::vec::convert(moments[2], nu, count);
}

}  // namespace

template <class T>
void blockwise_step_elements(const BlockwiseTensor<T>& t, int64_t begin, int64_t end) {
  alignas(64) float m1[BLOCK_SIZE], m2[BLOCK_SIZE], nu[BLOCK_SIZE];
  for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first));
    Run<T> param(t.param, first, count), grad(t.grad, first, count);
    decode(t.exp_avg, first, count, m1);
    decode(t.exp_avg_slow, first, count, m2);
    decode(t.exp_avg_sq, first, count, nu);
    step_block(param.data(), grad.data(), m1, m2, nu, count, t.scalars);
    param.write_back();
    zero_where_not_finite(m1, m2, nu, count);
    encode(m1, first, count, nullptr, t.exp_avg);
    encode(m2, first, count, nullptr, t.exp_avg_slow);
    encode(nu, first, count, t.stochastic_rounding ? &t.random : nullptr, t.exp_avg_sq);
  }
}

template void blockwise_step_elements(const BlockwiseTensor<float>&, int64_t, int64_t);
template void blockwise_step_elements(const BlockwiseTensor<double>&, int64_t, int64_t);

void quantize_elements(const float* values, const Quantized& target, const RandomKey* random, int64_t begin,
                       int64_t end) {
  float block[BLOCK_SIZE];
  for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first));
    std::copy_n(values + first, count, block);
    encode(block, first, count, random, target);
  }
}

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += BLOCK_SIZE)
    decode(source, first, static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first)), values + first);
}

}  // namespace ademamix

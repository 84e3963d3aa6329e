#include "blockwise_kernel.h"

#include "blockwise_simd.h"
#include "step_run.h"
#include "weights.h"

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

// Of finite values with that absmax.
void encode(const float* values, float absmax, int64_t first, int count, const RandomKey* random,
            const Quantized& target) {
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

// A block's moments between decoding and encoding.
struct Moments {
  alignas(64) float m1[BLOCK_SIZE], m2[BLOCK_SIZE], nu[BLOCK_SIZE];
  float m1_absmax, m2_absmax, nu_absmax;  // not finite if an element isn't
};

#if defined(ADEMAMIX_BLOCKWISE_SIMD)

ADEMAMIX_INLINE Floats decode_slow(const int16_t* codes) {
  return multiply(to_floats(load_codes(codes)), floats(1 / LINEAR_MAX));
}
ADEMAMIX_INLINE Floats decode_slow(const uint8_t* codes) { return decode_map<true>(codes); }

// A whole block, decoded, updated and measured in one loop: the divider works beside the decoding.
template <class SlowCode>
void step_whole_block(float* param, const float* grad, const BlockwiseTensor<float>& t, int64_t first, Moments& m) {
  using V = Simd<float>;
  static_assert(V::SIZE == LANES);
  const StepScalars<V> scalars(t.scalars);
  const int64_t block = first / BLOCK_SIZE;
  const Floats m1_scale = floats(t.exp_avg.absmax[block]), m2_scale = floats(t.exp_avg_slow.absmax[block]),
               nu_scale = floats(t.exp_avg_sq.absmax[block]);
  const uint8_t* m1_codes = static_cast<const uint8_t*>(t.exp_avg.codes) + first;
  const SlowCode* m2_codes = static_cast<const SlowCode*>(t.exp_avg_slow.codes) + first;
  const uint8_t* nu_codes = static_cast<const uint8_t*>(t.exp_avg_sq.codes) + first;
  // A float's magnitude and its bits without the sign are in the same order, and NaN comes last.
  const Ints magnitude = ints(INT32_MAX);
  Ints m1_most = ints(0), m2_most = ints(0), nu_most = ints(0);
  for (int i = 0; i < BLOCK_SIZE; i += LANES) {
    Element<V> e{V::load(param + i), V(V::Vector(multiply(decode_map<true>(m1_codes + i), m1_scale))),
                 V(V::Vector(multiply(decode_slow(m2_codes + i), m2_scale))),
                 V(V::Vector(multiply(decode_map<false>(nu_codes + i), nu_scale)))};
    update(e, V::load(grad + i), scalars);
    e.param.store(param + i);
    e.exp_avg.store(m.m1 + i);
    e.exp_avg_slow.store(m.m2 + i);
    e.exp_avg_sq.store(m.nu + i);
    m1_most = maximum(m1_most, bit_and(bits(e.exp_avg.v), magnitude));
    m2_most = maximum(m2_most, bit_and(bits(e.exp_avg_slow.v), magnitude));
    nu_most = maximum(nu_most, bit_and(bits(e.exp_avg_sq.v), magnitude));
  }
  m.m1_absmax = float_from_bits(largest(m1_most));
  m.m2_absmax = float_from_bits(largest(m2_most));
  m.nu_absmax = float_from_bits(largest(nu_most));
}

#endif

void step_moments(float* param, const float* grad, Moments& m, int count, const StepScalars<float>& scalars) {
  step_run(param, grad, m.m1, m.m2, m.nu, count, scalars);
}

void step_moments(double* param, const double* grad, Moments& m, int count, const StepScalars<double>& scalars) {
  double m1[BLOCK_SIZE], m2[BLOCK_SIZE], nu[BLOCK_SIZE];
  at::vec::convert(m.m1, m1, count);
  at::vec::convert(m.m2, m2, count);
  at::vec::convert(m.nu, nu, count);
  step_run(param, grad, m1, m2, nu, count, scalars);
  at::vec::convert(m1, m.m1, count);
  at::vec::convert(m2, m.m2, count);
  at::vec::convert(nu, m.nu, count);
}

float absmax_of(const float* values, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, float_bits(values[i]) & INT32_MAX);
  return float_from_bits(most);
}

template <class T>
void step_block(T* param, const T* grad, const BlockwiseTensor<T>& t, int64_t first, int count, Moments& m) {
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  if constexpr (std::is_same_v<T, float>) {
    if (count == BLOCK_SIZE) {
      return t.exp_avg_slow.format == BlockFormat::LINEAR_INT16 ? step_whole_block<int16_t>(param, grad, t, first, m)
                                                                : step_whole_block<uint8_t>(param, grad, t, first, m);
    }
  }
#endif
  decode(t.exp_avg, first, count, m.m1);
  decode(t.exp_avg_slow, first, count, m.m2);
  decode(t.exp_avg_sq, first, count, m.nu);
  step_moments(param, grad, m, count, t.scalars);
  m.m1_absmax = absmax_of(m.m1, count);
  m.m2_absmax = absmax_of(m.m2, count);
  m.nu_absmax = absmax_of(m.nu, count);
}

// An element of which one moment isn't finite loses all three, and its neighbours nothing.
void zero_where_not_finite(Moments& m, int count) {
  for (int i = 0; i < count; ++i) {
    if (std::isfinite(m.m1[i]) && std::isfinite(m.m2[i]) && std::isfinite(m.nu[i])) continue;
    m.m1[i] = m.m2[i] = m.nu[i] = 0;
  }
  m.m1_absmax = absmax_of(m.m1, count);
  m.m2_absmax = absmax_of(m.m2, count);
  m.nu_absmax = absmax_of(m.nu, count);
}

}  // namespace

template <class T>
void blockwise_step_elements(const BlockwiseTensor<T>& t, int64_t begin, int64_t end) {
  Moments m;
  for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first));
    Weights<T> param(t.param, first, count);
    Run<T> grad(t.grad, first, count);
    step_block(param.data(), grad.data(), t, first, count, m);
    param.write_back();
    const bool finite = std::isfinite(m.m1_absmax) && std::isfinite(m.m2_absmax) && std::isfinite(m.nu_absmax);
    if (!finite) zero_where_not_finite(m, count);
    encode(m.m1, m.m1_absmax, first, count, nullptr, t.exp_avg);
    encode(m.m2, m.m2_absmax, first, count, nullptr, t.exp_avg_slow);
    encode(m.nu, m.nu_absmax, first, count, t.stochastic_rounding ? &t.random : nullptr, t.exp_avg_sq);
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
    const float absmax = clean_and_absmax(block, count);
    encode(block, absmax, first, count, random, target);
  }
}

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += BLOCK_SIZE)
    decode(source, first, static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first)), values + first);
}

}  // namespace ademamix

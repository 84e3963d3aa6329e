#include "blockwise_kernel.h"

#include "codes.h"
#include "random_block.h"
#include "step_run.h"
#include "weights.h"

namespace ademamix {
namespace {

// The loops below are over at most one block, and simple enough for compilers to make vectors of them; what these
// don't see through is written with torch's vectors.
using V = Simd<float>;

// A block's values. Loops over vectors may go on to the end of the last vector.
template <class T>
using Block = T[BLOCK_SIZE];

// `first` is the number of the block's first element.
template <class T>
void decode(const Quantized& source, int64_t first, int count, T* values) {
  const float absmax = source.absmax[first / BLOCK_SIZE];
  with_format(source.format, [&](auto format) {
    const auto* codes = static_cast<const typename decltype(format)::Code*>(source.codes) + first;
    const float unit = absmax * format.UNIT;
    for (int i = 0; i < count; ++i) values[i] = format.decode(static_cast<float>(codes[i]), unit);
  });
}

// NaN is the largest of all: magnitudes and their bits are in the same order.
float absmax_of(const float* values, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, float_bits(values[i]) & INT32_MAX);
  return float_from_bits(most);
}

void replace_by_roots(Block<float>& values, int count) {
  for (int i = 0; i < count; i += V::SIZE) sqrt(V::load(values + i)).store(values + i);
}

// Replaces a block's finite values, or roots for FourthRoot, by floats that have their codes as the lowest bits.
template <class Encode>
void replace_by_codes(Block<float>& values, int count, const Encode& encode) {
  for (int i = 0; i < count; i += V::SIZE) encode(V::load(values + i)).store(values + i);
}

// The lowest bits of floats. __restrict, since codes are char, which might be any other memory.
template <class Code>
void store_codes(const float* __restrict values, int count, Code* __restrict codes) {
  for (int i = 0; i < count; ++i) codes[i] = static_cast<Code>(float_bits(values[i]));
}

void store_rounded(const float* __restrict positions, const uint16_t* __restrict random, int count,
                   uint8_t* __restrict codes) {
  for (int i = 0; i < count; ++i)
    codes[i] = static_cast<uint8_t>(FourthRoot::round(positions[i], random[i]) >> FourthRoot::STOCHASTIC_SHIFT);
}

// Leaves garbage in `values`, of which FourthRoot takes the roots. `absmax` is theirs.
void encode(Block<float>& values, float absmax, int64_t first, int count, const RandomKey* random,
            const Quantized& target) {
  target.absmax[first / BLOCK_SIZE] = absmax;
  const V inverse(inverse_absmax(absmax));
  with_format(target.format, [&](auto format) {
    using Format = decltype(format);
    auto* codes = static_cast<typename Format::Code*>(target.codes) + first;
    if constexpr (!std::is_same_v<Format, FourthRoot>) {
      replace_by_codes(values, count, [&](V value) { return Format::encode(value, inverse); });
    } else if (random) {
      uint16_t bits[BLOCK_SIZE];
      random_block(*random, static_cast<uint64_t>(first) / RANDOM_GROUP, bits);
      constexpr int ZERO = FourthRoot::POSITION_ZERO;
      replace_by_codes(values, count, [&](V root) { return Format::template encode<ZERO>(root, inverse); });
      return store_rounded(values, bits, count, codes);
    } else {
      replace_by_codes(values, count, [&](V root) { return Format::template encode<ROUNDING_MAGIC>(root, inverse); });
    }
    store_codes(values, count, codes);
  });
}

// The moments of a block; after the step with the roots of nu in its place.
struct Moments {
  alignas(64) Block<float> m1, m2, nu;
  float m1_absmax, m2_absmax, nu_absmax;  // not finite if an element isn't

  void measure(int count) {
    m1_absmax = absmax_of(m1, count);
    m2_absmax = absmax_of(m2, count);
    nu_absmax = absmax_of(nu, count);
  }
};

// absmax_of, while vectors pass by.
class Largest {
 public:
  void add(V values) { most_ = at::vec::maximum(most_, at::vec::cast<int32_t>(values.v) & Ints(INT32_MAX)); }

  float get() const {
    int32_t most[V::SIZE];
    most_.store(most);
    return float_from_bits(static_cast<uint32_t>(*std::max_element(most, most + V::SIZE)));
  }

 private:
  using Ints = at::vec::Vectorized<int32_t>;

  Ints most_{0};
};

// A whole block, decoded, updated and measured in one loop: the divider works beside the rest.
template <class Slow>
void step_whole_block(float* param, const float* grad, const BlockwiseTensor<float>& t, int64_t first, Moments& m) {
  const StepScalars<V> scalars(t.scalars);
  const auto* m1_codes = static_cast<const int8_t*>(t.exp_avg.codes) + first;
  const auto* m2_codes = static_cast<const typename Slow::Code*>(t.exp_avg_slow.codes) + first;
  const auto* nu_codes = static_cast<const uint8_t*>(t.exp_avg_sq.codes) + first;
  const int64_t block = first / BLOCK_SIZE;
  const V m1_unit(t.exp_avg.absmax[block] * SignedSqrt::UNIT), m2_unit(t.exp_avg_slow.absmax[block] * Slow::UNIT),
      nu_unit(t.exp_avg_sq.absmax[block] * FourthRoot::UNIT);
  Largest m1_largest, m2_largest, nu_largest;
  for (int i = 0; i < BLOCK_SIZE; i += V::SIZE) {
    Element<V> e{V::load(param + i), SignedSqrt::decode(load_codes(m1_codes + i), m1_unit),
                 Slow::decode(load_codes(m2_codes + i), m2_unit),
                 FourthRoot::decode(load_codes(nu_codes + i), nu_unit)};
    const V root = update(e, V::load(grad + i), scalars);
    e.param.store(param + i);
    e.exp_avg.store(m.m1 + i);
    e.exp_avg_slow.store(m.m2 + i);
    root.store(m.nu + i);
    m1_largest.add(e.exp_avg);
    m2_largest.add(e.exp_avg_slow);
    nu_largest.add(root);
  }
  m.m1_absmax = m1_largest.get();
  m.m2_absmax = m2_largest.get();
  m.nu_absmax = nu_largest.get();
}

void step_moments(float* param, const float* grad, const BlockwiseTensor<float>& t, int64_t first, int count,
                  Moments& m) {
  if (count == BLOCK_SIZE)
    return t.exp_avg_slow.format == BlockFormat::LINEAR_INT16 ? step_whole_block<Linear>(param, grad, t, first, m)
                                                              : step_whole_block<SignedSqrt>(param, grad, t, first, m);
  decode(t.exp_avg, first, count, m.m1);
  decode(t.exp_avg_slow, first, count, m.m2);
  decode(t.exp_avg_sq, first, count, m.nu);
  step_run(param, grad, m.m1, m.m2, m.nu, count, t.scalars);
  replace_by_roots(m.nu, count);
  m.measure(count);
}

void step_moments(double* param, const double* grad, const BlockwiseTensor<double>& t, int64_t first, int count,
                  Moments& m) {
  Block<double> m1, m2, nu;
  decode(t.exp_avg, first, count, m1);
  decode(t.exp_avg_slow, first, count, m2);
  decode(t.exp_avg_sq, first, count, nu);
  step_run(param, grad, m1, m2, nu, count, t.scalars);
  at::vec::convert(m1, m.m1, count);
  at::vec::convert(m2, m.m2, count);
  at::vec::convert(nu, m.nu, count);
  replace_by_roots(m.nu, count);
  m.measure(count);
}

}  // namespace

template <class T>
void blockwise_step_elements(const BlockwiseTensor<T>& t, int64_t begin, int64_t end) {
  Moments m{};
  for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first));
    Weights<T> param(t.param, first, count);
    Run<T> grad(t.grad, first, count);
    step_moments(param.data(), grad.data(), t, first, count, m);
    param.write_back();
    if (!(std::isfinite(m.m1_absmax) && std::isfinite(m.m2_absmax) && std::isfinite(m.nu_absmax))) {
      // An element of which one moment isn't finite loses all three, and its neighbours nothing.
      for (int i = 0; i < count; ++i) {
        if (std::isfinite(m.m1[i]) && std::isfinite(m.m2[i]) && std::isfinite(m.nu[i])) continue;
        m.m1[i] = m.m2[i] = m.nu[i] = 0;
      }
      m.measure(count);
    }
    encode(m.m1, m.m1_absmax, first, count, nullptr, t.exp_avg);
    encode(m.m2, m.m2_absmax, first, count, nullptr, t.exp_avg_slow);
    encode(m.nu, m.nu_absmax, first, count, t.stochastic_rounding ? &t.random : nullptr, t.exp_avg_sq);
  }
}

template void blockwise_step_elements(const BlockwiseTensor<float>&, int64_t, int64_t);
template void blockwise_step_elements(const BlockwiseTensor<double>&, int64_t, int64_t);

void quantize_elements(const float* values, const Quantized& target, const RandomKey* random, int64_t begin,
                       int64_t end) {
  Block<float> block{};
  for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
    const int count = static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first));
    for (int i = 0; i < count; ++i) block[i] = finite_or_zero(values[first + i]);
    if (target.format == BlockFormat::FOURTH_ROOT_UINT8) {
      for (int i = 0; i < count; ++i) block[i] = larger(block[i], 0.0f);
      replace_by_roots(block, count);
    }
    encode(block, absmax_of(block, count), first, count, random, target);
  }
}

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += BLOCK_SIZE)
    decode(source, first, static_cast<int>(std::min<int64_t>(BLOCK_SIZE, end - first)), values + first);
}

}  // namespace ademamix

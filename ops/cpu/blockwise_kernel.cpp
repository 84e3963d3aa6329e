// The step with quantized state, and quantization alone, on the CPU.
#include "chunk.h"
#include "codes.h"
#include "kernels.h"
#include "random_block.h"
#include "weights.h"

namespace ademamix {
namespace {

// The loops below are over at most one block. They are written with torch's vectors, unless compilers vectorize them
// by themselves.
using V = Simd<float>;

// A block's values. Loops over vectors may continue to the end of the last vector.
template <class T>
using Block = T[BLOCK_SIZE];

// `first` is the index of the block's first element.
template <class T>
void decode(const Quantized& source, int64_t first, int count, T* values) {
  const float absmax = source.absmax[first / BLOCK_SIZE];
  with_format(source.format, [&](auto format) {
    using Format = decltype(format);
    const auto* codes = static_cast<const typename Format::Code*>(source.codes) + first;
    const auto* words = static_cast<const int16_t*>(source.codes) + first;
    for (int i = 0; i < count; ++i) {
      const int32_t code = source.in_words ? code_in_word<Format>(words[i]) : codes[i];
      values[i] = Format::decode(static_cast<float>(code), absmax * Format::UNIT);
    }
  });
}

// NaN counts as the largest value: magnitudes and their bits are in the same order.
float absmax_of(const float* values, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, float_bits(values[i]) & INT32_MAX);
  return float_from_bits(most);
}

void replace_by_roots(Block<float>& values, int count) {
  for (int i = 0; i < count; i += V::SIZE) sqrt(V::load(values + i)).store(values + i);
}

Ints bits_of(V values) { return at::vec::cast<int32_t>(values.v); }

// Returns the codes of a vector of a block's finite values (for fourth-root formats, of their square roots) in the
// lowest bits; the bits above may be garbage. `random` has the block's random bits, or is null to round to nearest; `i`
// is the index of the first value in the block.
template <class Format>
Ints codes_of(V values, V inverse, const uint16_t* random, int i) {
  if constexpr (Format::POSITION_ZERO != 0)
    if (random) {
      const Ints positions = bits_of(Format::template encode<Format::POSITION_ZERO>(values, inverse));
      const Ints bits = load_bits<RANDOM_ELEMENT<Format>>(random, i);
      return round_position<Format>(positions, bits) >> Ints(STOCHASTIC_SHIFT);
    }
  return bits_of(Format::encode(values, inverse));
}

// Returns words of codes of Linear12 and others, in the lowest 16 bits; the codes are in their lowest bits.
Ints words_of(Ints slow, Ints others) { return slow << Ints(4) | (others & Ints(15)); }

// Quantizes a block's values, whose scale is `absmax`.
void encode_block(const Block<float>& values, float absmax, int64_t first, int count, const RandomKey* random,
                  const Quantized& target) {
  target.absmax[first / BLOCK_SIZE] = absmax;
  const V inverse(inverse_absmax(absmax));
  Block<uint16_t> bits;
  if (random) random_block(*random, static_cast<uint64_t>(first) / RANDOM_GROUP, bits);
  with_format(target.format, [&](auto format) {
    using Format = decltype(format);
    using Code = typename Format::Code;
    Block<Code> codes;
    for (int i = 0; i < count; i += V::SIZE)
      store_codes(codes_of<Format>(V::load(values + i), inverse, random ? bits : nullptr, i), codes + i);
    auto* own = static_cast<Code*>(target.codes) + first;
    auto* words = static_cast<int16_t*>(target.codes) + first;
    for (int i = 0; i < count; ++i) {
      constexpr bool HAS_GARBAGE = std::is_same_v<Format, SignedSqrt4>;  // above its 4 bits
      if (target.in_words)
        words[i] = static_cast<int16_t>(word_with_code<Format>(words[i], codes[i]));
      else
        own[i] = static_cast<Code>(HAS_GARBAGE ? code_in_word<Format>(codes[i]) : codes[i]);
    }
  });
}

// The moments of a block. After the step, nu has its square roots.
struct Moments {
  alignas(64) Block<float> m1, m2, nu;
  float m1_absmax, m2_absmax, nu_absmax;  // not finite if an element isn't

  void measure(int count) {
    m1_absmax = absmax_of(m1, count);
    m2_absmax = absmax_of(m2, count);
    nu_absmax = absmax_of(nu, count);
  }

  // If a moment of an element isn't finite, the element loses all three; its neighbours lose nothing.
  void drop_infinite(int count) {
    for (int i = 0; i < count; ++i)
      if (!(std::isfinite(m1[i]) && std::isfinite(m2[i]) && std::isfinite(nu[i]))) m1[i] = m2[i] = nu[i] = 0;
    measure(count);
  }

  bool finite() const { return std::isfinite(m1_absmax) && std::isfinite(m2_absmax) && std::isfinite(nu_absmax); }
};

// Computes absmax_of the vectors that are added.
class Largest {
 public:
  void add(V values) { most_ = at::vec::maximum(most_, bits_of(values) & Ints(INT32_MAX)); }

  float get() const {
    int32_t lanes[V::SIZE], most = 0;
    most_.store(lanes);
    for (const int32_t lane : lanes) most = std::max(most, lane);
    return float_from_bits(static_cast<uint32_t>(most));
  }

 private:
  Ints most_{0};
};

// Updates a whole block. Returns false, without having written anything, if a moment isn't finite.
//
// In a single loop, each element would wait for a root and then for a quotient, and a processor can keep only few of
// them waiting. So the first loop computes the moments and their roots, and the second one overlaps the quotients with
// the codes' roots.
template <class Fast, class Slow, class Sq>
bool step_whole_block(float* param, const float* grad, const BlockwiseTensor<float>& t, int64_t first, Moments& m) {
  constexpr bool EXP_AVG = IS_KEPT<Fast>, IN_WORDS = std::is_same_v<Slow, Linear12>;
  constexpr bool SQ_IN_WORDS = std::is_same_v<Sq, FourthRoot4>;
  using Other = std::conditional_t<SQ_IN_WORDS, Sq, Fast>;  // the format of the other codes in the words
  const StepScalars<V> scalars(t.scalars);
  auto* m1_codes = EXP_AVG ? static_cast<int8_t*>(t.exp_avg.codes) + first : nullptr;
  auto* m2_codes = static_cast<typename Slow::Code*>(t.exp_avg_slow.codes) + first;
  auto* nu_codes = static_cast<uint8_t*>(t.exp_avg_sq.codes) + first;
  const int64_t block = first / BLOCK_SIZE;
  float &m2_absmax = t.exp_avg_slow.absmax[block], &nu_absmax = t.exp_avg_sq.absmax[block];
  const V m1_unit(EXP_AVG ? t.exp_avg.absmax[block] * Fast::UNIT : 0), m2_unit(m2_absmax * Slow::UNIT),
      nu_unit(nu_absmax * Sq::UNIT);
  Largest m1_largest, m2_largest, nu_largest;
  for (int i = 0; i < BLOCK_SIZE; i += V::SIZE) {
    Element<V> e;
    if constexpr (IN_WORDS) {
      const Ints words = load_ints(m2_codes + i);
      const V others = to_float(SQ_IN_WORDS ? words & Ints(15) : words << Ints(28) >> Ints(28));
      e.exp_avg_slow = Slow::decode(to_float(words >> Ints(4)), m2_unit);
      (SQ_IN_WORDS ? e.exp_avg_sq : e.exp_avg) = Other::decode(others, SQ_IN_WORDS ? nu_unit : m1_unit);
    } else {
      if constexpr (EXP_AVG) e.exp_avg = Fast::decode(to_float(load_ints(m1_codes + i)), m1_unit);
      e.exp_avg_slow = Slow::decode(to_float(load_ints(m2_codes + i)), m2_unit);
    }
    if constexpr (!SQ_IN_WORDS) e.exp_avg_sq = Sq::decode(to_float(load_ints(nu_codes + i)), nu_unit);
    update_moments<EXP_AVG>(e, V::load(grad + i), scalars);
    const V root = sqrt(e.exp_avg_sq);
    e.exp_avg.store(m.m1 + i);
    e.exp_avg_slow.store(m.m2 + i);
    root.store(m.nu + i);
    if constexpr (EXP_AVG) m1_largest.add(e.exp_avg);  // a gradient that isn't finite shows in the others
    m2_largest.add(e.exp_avg_slow);
    nu_largest.add(root);
  }
  m.m1_absmax = m1_largest.get();
  m.m2_absmax = m2_largest.get();
  m.nu_absmax = nu_largest.get();
  if (!m.finite()) return false;

  if constexpr (EXP_AVG) t.exp_avg.absmax[block] = m.m1_absmax;
  m2_absmax = m.m2_absmax;
  nu_absmax = m.nu_absmax;
  const V m1_inverse(inverse_absmax(m.m1_absmax)), m2_inverse(inverse_absmax(m2_absmax)),
      nu_inverse(inverse_absmax(nu_absmax));
  Block<uint16_t> bits;
  const uint16_t* const random = t.stochastic_rounding ? bits : nullptr;
  if (random) random_block(t.random, static_cast<uint64_t>(first) / RANDOM_GROUP, bits);
  for (int i = 0; i < BLOCK_SIZE; i += V::SIZE) {
    Element<V> e{V::load(param + i), V::load(m.m1 + i), V::load(m.m2 + i), V{}};
    const V root = V::load(m.nu + i);
    update_param<EXP_AVG>(e, root, scalars);
    e.param.store(param + i);
    const Ints slow = codes_of<Slow>(e.exp_avg_slow, m2_inverse, nullptr, i);
    if constexpr (IN_WORDS) {
      const V &other = SQ_IN_WORDS ? root : e.exp_avg, &inverse = SQ_IN_WORDS ? nu_inverse : m1_inverse;
      store_codes(words_of(slow, codes_of<Other>(other, inverse, random, i)), m2_codes + i);
    } else {
      store_codes(slow, m2_codes + i);
      if constexpr (EXP_AVG) store_codes(codes_of<Fast>(e.exp_avg, m1_inverse, nullptr, i), m1_codes + i);
    }
    if constexpr (!SQ_IN_WORDS) store_codes(codes_of<Sq>(root, nu_inverse, random, i), nu_codes + i);
  }
  return true;
}

bool step_whole_block(float* param, const float* grad, const BlockwiseTensor<float>& t, int64_t first, Moments& m) {
  const bool has_exp_avg = t.exp_avg.codes, linear = t.exp_avg_slow.format == BlockFormat::LINEAR_INT16;
  auto* step = has_exp_avg ? step_whole_block<SignedSqrt, SignedSqrt, FourthRoot>
                           : step_whole_block<NoCodes, SignedSqrt, FourthRoot>;
  if (linear)
    step =
        has_exp_avg ? step_whole_block<SignedSqrt, Linear, FourthRoot> : step_whole_block<NoCodes, Linear, FourthRoot>;
  if (t.exp_avg_slow.in_words)
    step = has_exp_avg ? step_whole_block<SignedSqrt4, Linear12, FourthRoot>
                       : step_whole_block<NoCodes, Linear12, FourthRoot4>;
  return step(param, grad, t, first, m);
}

bool step_whole_block(double*, const double*, const BlockwiseTensor<double>&, int64_t, Moments&) { return false; }

template <class T>
void step_moments(T* param, const T* grad, const BlockwiseTensor<T>& t, int64_t first, int count, Moments& m) {
  Block<T> m1{}, m2, nu;
  if (t.exp_avg.codes) decode(t.exp_avg, first, count, m1);
  decode(t.exp_avg_slow, first, count, m2);
  decode(t.exp_avg_sq, first, count, nu);
  t.exp_avg.codes ? step_chunk<true>(param, grad, m1, m2, nu, count, t.scalars)
                  : step_chunk<false>(param, grad, m1, m2, nu, count, t.scalars);
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
    Chunk<T> grad(t.grad, first, count);
    if (count < BLOCK_SIZE || !step_whole_block(param.data(), grad.data(), t, first, m)) {
      step_moments(param.data(), grad.data(), t, first, count, m);
      if (!m.finite()) m.drop_infinite(count);
      const RandomKey* const random = t.stochastic_rounding ? &t.random : nullptr;
      if (t.exp_avg.codes) encode_block(m.m1, m.m1_absmax, first, count, random, t.exp_avg);
      encode_block(m.m2, m.m2_absmax, first, count, nullptr, t.exp_avg_slow);
      encode_block(m.nu, m.nu_absmax, first, count, random, t.exp_avg_sq);
    }
    param.write_back();
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
    if (with_format(target.format, [](auto format) { return IS_FOURTH_ROOT<decltype(format)>; })) {
      for (int i = 0; i < count; ++i) block[i] = larger(block[i], 0.0f);
      replace_by_roots(block, count);
    }
    encode_block(block, absmax_of(block, count), first, count, random, target);
  }
}

void dequantize_elements(const Quantized& source, float* values, int64_t begin, int64_t end) {
  with_format(source.format, [&](auto format) {
    using Format = decltype(format);
    const auto* codes = static_cast<const typename Format::Code*>(source.codes);
    for (int64_t first = begin; first < end; first += BLOCK_SIZE) {
      const float absmax = source.absmax[first / BLOCK_SIZE];
      const int64_t last = std::min(first + BLOCK_SIZE, end);
      for (int64_t i = first; i < last; ++i) values[i] = dequantize<Format>(static_cast<float>(codes[i]), absmax);
    }
  });
}

}  // namespace ademamix

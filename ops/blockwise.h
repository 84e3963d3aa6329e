// The formats of quantized state: blocks of 256 elements, each with one float32 scale, its absmax.
//
//   signed_sqrt_int8     sign(code) * (code / 127)^2 * absmax
//   fourth_root_uint8    ((code / 255)^2 * absmax)^2, with absmax that of the elements' square roots
//   linear_int16         code / 32767 * absmax
//   linear_int12         code / 2047 * absmax, in one word with one of the following
//   signed_sqrt_int4     sign(code) * (code / 7)^2 * absmax
//   fourth_root_uint4    ((code / 15)^2 * absmax)^2
//
// torch_ademamix/numerics/blockwise.py defines the same formats in PyTorch and is their oracle: codes and scales agree
// bit for bit on every processor. So every operation below is one IEEE float32 operation, and all is built without
// contraction; on CUDA, roots within the step are approximate (cuda/approximate.cuh). V is float or a vector of it.
#pragma once

#include <cfloat>
#include <type_traits>

#include "value.h"

namespace ademamix {

constexpr int BLOCK_SIZE = 256;

constexpr int64_t block_count(int64_t numel) { return (numel + BLOCK_SIZE - 1) / BLOCK_SIZE; }

// In the order of CODE_DTYPES in torch_ademamix/numerics/blockwise.py.
enum class BlockFormat : int8_t {
  SIGNED_SQRT_INT8,
  FOURTH_ROOT_UINT8,
  LINEAR_INT16,
  LINEAR_INT12,
  SIGNED_SQRT_INT4,
  FOURTH_ROOT_UINT4
};
constexpr int BLOCK_FORMATS = 6;

// 1.5 * 2^23: a float of that size has whole numbers for ulps, and its low bits are the two's complement of what was
// added to it. Those are what encoders to the nearest code return; the bits above the code are garbage.
constexpr int ROUNDING_MAGIC = 12582912;

// A code's value is a function of the code, as a float, and of the block's unit, absmax * UNIT.
//
// encode() gives code 0 as the float ZERO: ROUNDING_MAGIC for the nearest code, POSITION_ZERO for stochastic rounding,
// next to which floats have 2^-POSITION_BITS for ulps. A format without it is rounded to nearest only.

template <class C, int LARGEST>
struct SignedSqrtFormat {
  using Code = C;
  static constexpr float MAX = LARGEST, UNIT = 1 / (MAX * MAX);
  static constexpr int POSITION_ZERO = 0;

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    return code * abs(code) * unit;
  }

  template <class V>
  ADEMAMIX_INLINE static V encode(V value, V inverse) {
    return fma(copysign(unit_sqrt(abs(value) * inverse), value), V(MAX), V(ROUNDING_MAGIC));
  }
};

struct SignedSqrt : SignedSqrtFormat<int8_t, 127> {};

struct SignedSqrt4 : SignedSqrtFormat<int8_t, 7> {
  static constexpr int POSITION_ZERO = 192, POSITION_BITS = 16, BITS = 4;

  // Rounding a root stochastically adds f (1 - f) / MAX^2 to its square on average, relative to the scale, for a
  // fraction f of a code. That gain is subtracted before, except from the largest magnitude.
  static constexpr float GAIN = 1 / 256.0f;

  template <int ZERO = ROUNDING_MAGIC, class V>
  ADEMAMIX_INLINE static V encode(V value, V inverse) {
    V fraction = abs(value) * inverse;
    if constexpr (ZERO == POSITION_ZERO) fraction = at_least_zero(fma(fraction, V(1 + GAIN), V(-GAIN)));
    return fma(copysign(unit_sqrt(fraction), value), V(MAX), V(ZERO));
  }
};

template <int LARGEST>
struct LinearFormat {
  using Code = int16_t;
  static constexpr float MAX = LARGEST, UNIT = 1 / MAX;
  static constexpr int POSITION_ZERO = 0;

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    return code * unit;
  }

  template <class V>
  ADEMAMIX_INLINE static V encode(V value, V inverse) {
    return fma(value * inverse, V(MAX), V(ROUNDING_MAGIC));
  }
};

struct Linear : LinearFormat<32767> {};
struct Linear12 : LinearFormat<2047> {};

// For values that aren't negative. The optimizer needs their square root anyway, and a root's scale is never denormal.
//
// SMALLEST_CODE is the smallest code of a positive value. The next step divides by its root, so the value may neither
// become 0 nor, by chance, much smaller than it is: of 255, codes 1 to 3 are as far from each other as from 0, so that
// smaller codes are raised to 4.
template <int LARGEST, int SMALLEST_CODE>
struct FourthRootFormat {
  using Code = uint8_t;
  static constexpr float MAX = LARGEST, UNIT = 1 / (MAX * MAX);
  static constexpr int SMALLEST = SMALLEST_CODE;

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    const V root = code * code * unit;
    return root * root;
  }

  template <int ZERO = ROUNDING_MAGIC, class V>
  ADEMAMIX_INLINE static V encode(V sqrt_value, V inverse) {
    const V root = unit_sqrt(at_most_one(sqrt_value * inverse));
    const V code = ZERO != ROUNDING_MAGIC ? fma_down(root, V(MAX), V(ZERO)) : fma(root, V(MAX), V(ZERO));
    return if_positive(sqrt_value, larger(code, V(ZERO + SMALLEST)), code);
  }
};

struct FourthRoot : FourthRootFormat<255, 4> {
  static constexpr int POSITION_ZERO = 256, POSITION_BITS = 15, BITS = 8;
};

struct FourthRoot4 : FourthRootFormat<15, 1> {
  static constexpr int POSITION_ZERO = 128, POSITION_BITS = 16, BITS = 4;
};

template <class Format>
constexpr bool IS_FOURTH_ROOT = std::is_same_v<Format, FourthRoot> || std::is_same_v<Format, FourthRoot4>;

// The value of a code outside of a step. A block's largest code stands for the scale itself, which decode() may miss by
// an ulp: quantizing again then gives the same scale.
template <class Format>
ADEMAMIX_INLINE float dequantize(float code, float absmax) {
  const float largest = IS_FOURTH_ROOT<Format> ? absmax * absmax : absmax;
  return abs(code) == Format::MAX ? copysign(largest, code) : Format::decode(code, absmax * Format::UNIT);
}

// A word of 16 bits has a code of Linear12 in its upper 12 bits, and below it one of a format of 4 bits.
template <class Format>
ADEMAMIX_INLINE int32_t code_in_word(int32_t word) {
  if constexpr (std::is_same_v<Format, Linear12>) return word >> 4;
  if constexpr (std::is_same_v<Format, FourthRoot4>) return word & 15;
  return static_cast<int32_t>(static_cast<uint32_t>(word) << 28) >> 28;
}

template <class Format>
ADEMAMIX_INLINE int32_t word_with_code(int32_t word, int32_t code) {
  if constexpr (std::is_same_v<Format, Linear12>) return (word & 15) | code * 16;
  return (word & ~15) | (code & 15);
}

// Two codes of an element are rounded independently with the bits of one Philox call: the code of exp_avg uses the bits
// that the code of exp_avg_sq uses in another element of the group, i ^ RANDOM_ELEMENT for element i.
template <class Format>
constexpr int RANDOM_ELEMENT = std::is_same_v<Format, SignedSqrt4> ? 4 : 0;

// Rounds up with the probability of the fraction, to within 2e-5, from the bits of a position and 16 random bits. The
// code is the Format::BITS from STOCHASTIC_SHIFT on; the bits above them may be garbage.
constexpr int STOCHASTIC_SHIFT = 16;

template <class Format, class Bits>
ADEMAMIX_INLINE Bits round_position(Bits position, Bits random) {
  static_assert(Format::POSITION_BITS == 15 || Format::POSITION_BITS == 16);
  return Format::POSITION_BITS == 15 ? position + position + random : position + random;
}

// The format of exp_avg if there is none: at beta1 = 0 it is the gradient.
struct NoCodes {
  using Code = int8_t;
  static constexpr float UNIT = 0;
};

template <class Format>
constexpr bool IS_KEPT = !std::is_same_v<Format, NoCodes>;

// Calls f with a value of a format's struct.
template <class F>
auto with_format(BlockFormat format, F&& f) {
  switch (format) {
    case BlockFormat::SIGNED_SQRT_INT8: return f(SignedSqrt{});
    case BlockFormat::FOURTH_ROOT_UINT8: return f(FourthRoot{});
    case BlockFormat::LINEAR_INT12: return f(Linear12{});
    case BlockFormat::SIGNED_SQRT_INT4: return f(SignedSqrt4{});
    case BlockFormat::FOURTH_ROOT_UINT4: return f(FourthRoot4{});
    default: return f(Linear{});
  }
}

// Returns the factor of values before they are encoded: 1 / absmax, but finite.
ADEMAMIX_INLINE float inverse_absmax(float absmax) {
#if defined(__CUDA_ARCH__)
  return ::fminf(__frcp_rn(absmax), FLT_MAX);
#else
  const float inverse = 1 / absmax;
  return inverse < FLT_MAX ? inverse : FLT_MAX;
#endif
}

// Blocks take their scale from the finite elements; the others are stored as 0.
ADEMAMIX_INLINE float finite_or_zero(float value) { return ::fabsf(value) <= FLT_MAX ? value : 0.0f; }

// Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: passes BigCrush).
// Key: the seed. Counter: the index of the group of 8 elements in two words, low first; the step; the tensor's own
// subsequence. The four words are 8 times 16 bits: element i of the group has the low half of word i / 2 if i is even,
// else the high half.
constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_MULTIPLIER[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t PHILOX_KEY_STEP[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int RANDOM_GROUP = 8;

struct RandomKey {
  uint64_t seed;
  uint32_t step;
  uint32_t subsequence;
  uint64_t first_group;
};

// `subsequence` has the tensor's subsequence in its lower half. The upper half is the index of the tensor's first group
// in a larger tensor that it is a shard of, so that its elements draw the bits that they would draw there; else 0.
ADEMAMIX_INLINE RandomKey random_key(uint64_t seed, uint32_t step, int64_t subsequence) {
  return {seed, step, static_cast<uint32_t>(subsequence), static_cast<uint64_t>(subsequence) >> 32};
}

struct RandomWords {
  uint32_t word[4];
};

ADEMAMIX_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // else the compiler multiplies 64-bit numbers by a constant
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// `group` is the group's index within the tensor. `purpose` sets bits that no group's index has.
ADEMAMIX_INLINE RandomWords random_words(const RandomKey& key, uint64_t group, uint64_t purpose = 0) {
  constexpr uint32_t multiplier0 = PHILOX_MULTIPLIER[0], multiplier1 = PHILOX_MULTIPLIER[1];
  constexpr uint32_t key_step0 = PHILOX_KEY_STEP[0], key_step1 = PHILOX_KEY_STEP[1];
  group = (group + key.first_group) ^ purpose;
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = key.step,
           c3 = key.subsequence;
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    const uint64_t product0 = wide_product(multiplier0, c0);
    const uint64_t product1 = wide_product(multiplier1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += key_step0;
    key1 += key_step1;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of element `i` of the group.
ADEMAMIX_INLINE uint32_t random_half(const RandomWords& words, int i) {
  return i % 2 ? words.word[i / 2] >> 16 : words.word[i / 2] & 0xffff;
}

}  // namespace ademamix

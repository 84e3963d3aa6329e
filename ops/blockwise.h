// The formats of quantized state: blocks of 256 elements, each with one float32 scale, its absmax.
//
//   signed_sqrt_int8     sign(code) * (code / 127)^2 * absmax
//   fourth_root_uint8    ((code / 255)^2 * absmax)^2, with absmax that of the elements' square roots
//   linear_int16         code / 32767 * absmax
//
// torch_ademamix/blockwise.py defines the same formats in PyTorch and is their oracle: codes and scales agree bit for
// bit on every processor. So every operation below is one IEEE float32 operation, and all is built without
// contraction; on CUDA, roots within the step are approximate (cuda/approximate.cuh). V is float or a vector of it.
#pragma once

#include <cfloat>

#include "value.h"

namespace ademamix {

constexpr int BLOCK_SIZE = 256;

constexpr int64_t block_count(int64_t numel) { return (numel + BLOCK_SIZE - 1) / BLOCK_SIZE; }

// In the order of torch_ademamix/blockwise.py's.
enum class BlockFormat : int8_t { SIGNED_SQRT_INT8, FOURTH_ROOT_UINT8, LINEAR_INT16 };

// 1.5 * 2^23: a float of that size has whole numbers for ulps, and its low bits are the two's complement of what was
// added to it. Those are what encoders to the nearest code return; the bits above the code are garbage.
constexpr int ROUNDING_MAGIC = 12582912;

// A code's value is a function of the code, as a float, and of the block's unit, absmax * UNIT. largest() is that of
// the largest code, exactly.

struct SignedSqrt {
  using Code = int8_t;
  static constexpr float MAX = 127, UNIT = 1 / (MAX * MAX);

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    return code * abs(code) * unit;
  }

  ADEMAMIX_INLINE static float largest(float absmax) { return absmax; }

  template <class V>
  ADEMAMIX_INLINE static V encode(V value, V inverse) {
    return fma(copysign(unit_sqrt(abs(value) * inverse), value), V(MAX), V(ROUNDING_MAGIC));
  }
};

struct Linear {
  using Code = int16_t;
  static constexpr float MAX = 32767, UNIT = 1 / MAX;

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    return code * unit;
  }

  ADEMAMIX_INLINE static float largest(float absmax) { return absmax; }

  template <class V>
  ADEMAMIX_INLINE static V encode(V value, V inverse) {
    return fma(value * inverse, V(MAX), V(ROUNDING_MAGIC));
  }
};

// Of values that aren't negative. The optimizer needs their square root anyway; and a root's scale is never denormal.
struct FourthRoot {
  using Code = uint8_t;
  static constexpr float MAX = 255, UNIT = 1 / (MAX * MAX);

  template <class V>
  ADEMAMIX_INLINE static V decode(V code, V unit) {
    const V root = code * code * unit;
    return root * root;
  }

  ADEMAMIX_INLINE static float largest(float absmax) { return absmax * absmax; }

  // Of a positive value. The next step divides by its root, so it may neither become 0 nor, by chance, much smaller
  // than it is: codes 1 to 3 are as far from each other as from 0, and what is below 4 goes up to it.
  static constexpr int SMALLEST = 4;

  // ZERO is what code 0 is as a float: ROUNDING_MAGIC gives the nearest code, POSITION_ZERO a position.
  template <int ZERO = ROUNDING_MAGIC, class V>
  ADEMAMIX_INLINE static V encode(V sqrt_value, V inverse) {
    const V root = unit_sqrt(at_most_one(sqrt_value * inverse));
    const V code = ZERO == POSITION_ZERO ? fma_down(root, V(MAX), V(ZERO)) : fma(root, V(MAX), V(ZERO));
    return if_positive(sqrt_value, larger(code, V(ZERO + SMALLEST)), code);
  }

  // Positions are floats in [256, 512), whose ulps are 2^-15 codes.
  static constexpr int POSITION_ZERO = 256;

  // Up with the probability of the fraction, right to 2e-5, by the bits of the position and 16 random ones. The code
  // is the byte from STOCHASTIC_SHIFT on: twice the position's bits have 16 after it, and in it nothing of the
  // exponent.
  static constexpr int STOCHASTIC_SHIFT = 16;

  template <class Bits>
  ADEMAMIX_INLINE static Bits round(Bits position, Bits random) {
    return position + position + random;
  }
};

// The value of a code outside of a step. A block's largest code stands for the scale itself, which decode() may miss by
// an ulp: quantizing again then gives the same scale.
template <class Format>
ADEMAMIX_INLINE float dequantize(float code, float absmax) {
  const float value = Format::decode(code, absmax * Format::UNIT);
  return abs(code) == Format::MAX ? copysign(Format::largest(absmax), code) : value;
}

// The format of an exp_avg that isn't kept: at beta1 = 0 it is the gradient.
struct NoCodes {
  using Code = int8_t;
};

template <class Format>
constexpr bool IS_KEPT = true;
template <>
constexpr bool IS_KEPT<NoCodes> = false;

// Calls f with a value of a format's struct.
template <class F>
auto with_format(BlockFormat format, F&& f) {
  switch (format) {
    case BlockFormat::SIGNED_SQRT_INT8: return f(SignedSqrt{});
    case BlockFormat::FOURTH_ROOT_UINT8: return f(FourthRoot{});
    default: return f(Linear{});
  }
}

// What values are multiplied by before they are encoded: 1 / absmax, but finite.
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
// Key: the seed. Counter: the number of the group of 8 elements in two words, low first; the step; the stream, which
// is the tensor's own number. The four words are 8 times 16 bits: element i of the group has the low half of word
// i / 2 if i is even, else the high half.
constexpr int PHILOX_ROUNDS = 7;
constexpr uint32_t PHILOX_MULTIPLIER[2] = {0xD2511F53, 0xCD9E8D57};
constexpr uint32_t PHILOX_KEY_STEP[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int RANDOM_GROUP = 8;

struct RandomKey {
  uint64_t seed;
  uint32_t step;
  uint32_t stream;
  uint64_t first_group;
};

// `stream` has the tensor's number in its lower half. In the upper half is the number of the tensor's first group where
// it is a part of a larger one: so that its elements draw what they would draw in the whole.
ADEMAMIX_INLINE RandomKey random_key(uint64_t seed, uint32_t step, int64_t stream) {
  return {seed, step, static_cast<uint32_t>(stream), static_cast<uint64_t>(stream) >> 32};
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

// `group`: its number within the tensor. `purpose` sets bits that no group's number has.
ADEMAMIX_INLINE RandomWords random_words(const RandomKey& key, uint64_t group, uint64_t purpose = 0) {
  constexpr uint32_t multiplier0 = PHILOX_MULTIPLIER[0], multiplier1 = PHILOX_MULTIPLIER[1];
  constexpr uint32_t key_step0 = PHILOX_KEY_STEP[0], key_step1 = PHILOX_KEY_STEP[1];
  group = (group + key.first_group) ^ purpose;
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32), c2 = key.step, c3 = key.stream;
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

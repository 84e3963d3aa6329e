// bfloat16 parameters. If they are rounded to nearest, an update below half an ulp, which is 0.2 to 0.4% of the weight,
// is lost. A remainder or stochastic rounding keeps it.
#pragma once

#include "blockwise.h"
#include "value.h"

namespace ademamix {

enum class ParamRounding : int8_t {
  NEAREST,
  REMAINDER,   // an int16 keeps what rounding removes: parameter and remainder together are the float32 weight
  REMAINDER8,  // an int8 keeps the upper half of that; the lower half is rounded stochastically
  STOCHASTIC,  // up or down at random, unbiased
};

constexpr bool has_remainder(ParamRounding rounding) {
  return rounding == ParamRounding::REMAINDER || rounding == ParamRounding::REMAINDER8;
}

// Whether the parameters draw random bits, which belong to their elements in row-major order.
constexpr bool draws(ParamRounding rounding) {
  return rounding == ParamRounding::STOCHASTIC || rounding == ParamRounding::REMAINDER8;
}

// `remainder_bytes` is the size of an element of the remainders, 0 if there are none.
constexpr ParamRounding param_rounding(int remainder_bytes, bool stochastic) {
  return stochastic             ? ParamRounding::STOCHASTIC
         : remainder_bytes == 0 ? ParamRounding::NEAREST
         : remainder_bytes == 1 ? ParamRounding::REMAINDER8
                                : ParamRounding::REMAINDER;
}

constexpr int REMAINDER8_SCALE = 256;  // an int8 remainder is so many int16 ones

// The weight's bits are the parameter's, followed by 16 zeros, plus the signed remainder. So the parameter is the
// weight rounded to nearest, and of two equally near values to the one of larger magnitude. If others have set the
// parameter to zero, a negative remainder would borrow into the sign and exponent bits and give NaN; the weight is then
// zero.
ADEMAMIX_INLINE float join_weight(uint32_t param, int32_t remainder) {
  const int32_t magnitude = static_cast<int32_t>((param & 0x7fff) << 16) + remainder;
  return float_from_bits(static_cast<uint32_t>(magnitude < 0 ? 0 : magnitude) | (param & 0x8000) << 16);
}

// The parameter is the upper half of the first word, the remainder the lower half of the second. The remainder of NaN
// is 0.
struct SplitWeight {
  uint32_t param, remainder;
};

ADEMAMIX_INLINE SplitWeight split_weight(float weight) {
  const uint32_t bits = float_bits(weight);
  return weight == weight ? SplitWeight{bits + 0x8000, bits} : SplitWeight{bits, 0};
}

// Rounds stochastically to a weight whose lowest 8 bits are 0, by the lowest 8 bits of `random`.
ADEMAMIX_INLINE float round_to_24_bits(float weight, uint32_t random) {
  const uint32_t bits = (float_bits(weight) + random % REMAINDER8_SCALE) / REMAINDER8_SCALE * REMAINDER8_SCALE;
  return weight == weight ? float_from_bits(bits) : weight;
}

// Returns bits whose upper half is the parameter: rounded up, in magnitude, with the probability of the fraction that
// is cut off. `random` has 16 bits. Infinity and NaN stay what they are (the upper half marks NaN).
ADEMAMIX_INLINE uint32_t round_stochastically(float weight, uint32_t random) {
  return weight == weight ? float_bits(weight) + random : float_bits(weight);
}

// The first group of elements for the random bits of parameters: a counter range that the groups of exp_avg_sq never
// reach, so the two never share random bits.
constexpr uint64_t FIRST_PARAM_GROUP = uint64_t{1} << 63;

}  // namespace ademamix

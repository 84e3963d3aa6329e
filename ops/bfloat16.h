// bfloat16 parameters. Rounded to nearest, an update below half an ulp, which is 0.2 to 0.4% of the weight, leaves
// them as they are; here are two ways to keep it.
#pragma once

#include "blockwise.h"
#include "value.h"

namespace ademamix {

enum class ParamRounding : int8_t {
  NEAREST,
  REMAINDER,   // an int16 beside the parameter has what rounding took away: together they are the float32 weight
  REMAINDER8,  // an int8 has the upper half of that; the lower one is rounded up or down at random
  STOCHASTIC,  // up or down at random, right on average
};

constexpr bool has_remainder(ParamRounding rounding) {
  return rounding == ParamRounding::REMAINDER || rounding == ParamRounding::REMAINDER8;
}

// Whether the parameters draw random bits, which belong to their elements in row-major order.
constexpr bool draws(ParamRounding rounding) {
  return rounding == ParamRounding::STOCHASTIC || rounding == ParamRounding::REMAINDER8;
}

// By the size of an element of the remainders, 0 if there are none.
constexpr ParamRounding param_rounding(int remainder_bytes, bool stochastic) {
  return stochastic             ? ParamRounding::STOCHASTIC
         : remainder_bytes == 0 ? ParamRounding::NEAREST
         : remainder_bytes == 1 ? ParamRounding::REMAINDER8
                                : ParamRounding::REMAINDER;
}

constexpr int REMAINDER8_UNIT = 256;  // of an int8 remainder, in units of an int16 one

// The weight's bits are the parameter's with 16 zeros after them, plus the remainder, which has a sign: so the
// parameter is the weight rounded to nearest, of two equally near values to the one of larger magnitude. Where others
// have set the parameter to 0, a remainder that goes on below that would give NaN.
ADEMAMIX_INLINE float join_weight(uint32_t param, int32_t remainder) {
  const int32_t magnitude = static_cast<int32_t>((param & 0x7fff) << 16) + remainder;
  return float_from_bits(static_cast<uint32_t>(magnitude < 0 ? 0 : magnitude) | (param & 0x8000) << 16);
}

// Two words of which the upper half of the first is the parameter, and the lower half of the second the remainder.
// NaN has none.
struct SplitWeight {
  uint32_t param, remainder;
};

ADEMAMIX_INLINE SplitWeight split_weight(float weight) {
  const uint32_t bits = float_bits(weight);
  return weight == weight ? SplitWeight{bits + 0x8000, bits} : SplitWeight{bits, 0};
}

// One of the two weights around whose lowest 8 bits are 0; of `random` the lowest 8 bits count.
ADEMAMIX_INLINE float round_to_24_bits(float weight, uint32_t random) {
  const uint32_t bits = (float_bits(weight) + random % REMAINDER8_UNIT) / REMAINDER8_UNIT * REMAINDER8_UNIT;
  return weight == weight ? float_from_bits(bits) : weight;
}

// The parameter is the upper half; `random` has 16 bits. Up, in magnitude, with the probability of the part that is
// cut off: infinite values stay so, and so does NaN, which carries its mark in the upper half.
ADEMAMIX_INLINE uint32_t round_stochastically(float weight, uint32_t random) {
  return weight == weight ? float_bits(weight) + random : float_bits(weight);
}

// The groups of elements by which the bits of parameters are drawn: none that a tensor's exp_avg_sq has.
constexpr uint64_t FIRST_PARAM_GROUP = uint64_t{1} << 63;

}  // namespace ademamix

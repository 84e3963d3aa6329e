// The formats of quantized state: blocks of 256 elements, each with one float32 scale, the block's absmax.
//
//   signed map      uint8: one of 256 values in [-0.993, 1], denser near 0, times absmax
//   unsigned map    uint8: one of 256 values in [0, 1], denser near 0, times absmax
//   linear int16    code / 32767, times absmax
//
// torch_ademamix/blockwise.py defines the same formats in PyTorch and is their oracle: codes and scales agree bit for
// bit on every device. So every operation below is one IEEE float32 operation (build with -ffp-contract=off; CUDA gets
// explicit intrinsics where it would contract), and the tables are compile-time constants made from one formula.
#pragma once

#include <cfloat>

#include "value.h"

namespace ademamix {

constexpr int BLOCK_SIZE = 256;

constexpr int64_t block_count(int64_t numel) { return (numel + BLOCK_SIZE - 1) / BLOCK_SIZE; }

// In the order of torch_ademamix/blockwise.py's.
enum class BlockFormat : int8_t { SIGNED_DYNAMIC, UNSIGNED_DYNAMIC, LINEAR_INT16 };

// ---------------------------------------------------------------------------------------------------------- the maps

// The nonnegative half of the signed map has the ranks 0 to 128 (code = 127 + rank; the negative values have ranks
// -127 to -1), the unsigned map the ranks 0 to 255 (code = rank).
constexpr int SIGNED_ZERO_CODE = 127;

constexpr int max_rank(bool is_signed) { return is_signed ? 128 : 255; }

constexpr int floor_log2(int a) {
  int exponent = 0;
  while (a >> (exponent + 1)) ++exponent;
  return exponent;
}

// bitsandbytes' dynamic maps (bitsandbytes.functional.create_dynamic_map). Between 0 and 1, decade e has 2^e values:
// the centres of 2^e equal parts of [0.1, 1] * 10^(e - 6) (signed, e = 0 to 6) or * 10^(e - 7) (unsigned, e = 1 to 7).
// Centre j is dividend / divisor, both exact in float, so the quotient is the exact value rounded once.
constexpr int DECADES = 7;

constexpr int first_decade(bool is_signed) { return is_signed ? 0 : 1; }

// position: 2^e + j.
constexpr int map_dividend(int position) { return 9 * (2 * position + 1) - (16 << floor_log2(position)); }

constexpr float map_divisor(bool is_signed, int e) {
  float divisor = static_cast<float>(2 << e);
  for (int i = e; i < first_decade(is_signed) + DECADES; ++i) divisor *= 10;
  return divisor;
}

constexpr float map_value(bool is_signed, int rank) {
  if (rank <= 0) return 0;
  if (rank >= max_rank(is_signed)) return 1;
  const int position = is_signed ? rank : rank + 1;
  return static_cast<float>(map_dividend(position)) / map_divisor(is_signed, floor_log2(position));
}

constexpr float SMALLEST_UNSIGNED = map_value(false, 1);  // above 0

// Where rounding to nearest passes from rank - 1 to rank: the smallest float that is not below the exact midpoint of
// the two map values. A tie thus goes to the value that is larger in magnitude.
constexpr float boundary(bool is_signed, int rank) {
  const double middle = (static_cast<double>(map_value(is_signed, rank - 1)) + map_value(is_signed, rank)) / 2;
  const float nearest = static_cast<float>(middle);
  if (nearest >= middle) return nearest;
  float ulp = FLT_EPSILON;
  while (ulp * (1 / FLT_EPSILON) > nearest) ulp /= 2;
  return nearest + ulp;
}

// ------------------------------------------------------------------------------------------------------- the scale

ADEMAMIX_INLINE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Blocks take their scale from the finite elements; the others are stored as 0.
ADEMAMIX_INLINE float finite_or_zero(float value) { return ::fabsf(value) <= FLT_MAX ? value : 0.0f; }

// What values are multiplied by before they are encoded: 1 / absmax, but finite, and small enough that no value of
// the block passes 1 (a denormal quotient has few digits).
ADEMAMIX_INLINE float inverse_absmax(float absmax) {
#if defined(__CUDA_ARCH__)
  const float inverse = ::fminf(__frcp_rn(absmax), FLT_MAX);
#else
  const float inverse = ::fminf(1.0f / absmax, FLT_MAX);
#endif
  return multiply(absmax, inverse) > 1.0f ? float_from_bits(float_bits(inverse) - 1) : inverse;
}

// ------------------------------------------------------------------------------------------------ to the nearest value

// Index of a float from LOWEST to 1 by its exponent and upper MANTISSA_BITS.
template <int LOWEST_EXPONENT, int MANTISSA_BITS>
struct TopBits {
  static constexpr int SHIFT = 23 - MANTISSA_BITS;
  static constexpr int FIRST = (127 + LOWEST_EXPONENT) << MANTISSA_BITS;
  static constexpr int COUNT = (-LOWEST_EXPONENT << MANTISSA_BITS) + 1;  // up to 1.0
  static constexpr float LOWEST = 1.0f / (1 << -LOWEST_EXPONENT);

  ADEMAMIX_INLINE static int index(float a) { return static_cast<int>(float_bits(a) >> SHIFT) - FIRST; }

  // The same in constant expressions, where a float's bits can't be read.
  static constexpr int constant_index(float a) {
    int exponent = LOWEST_EXPONENT;
    float power = LOWEST;
    while (a >= 2 * power) power *= 2, ++exponent;
    return ((exponent - LOWEST_EXPONENT) << MANTISSA_BITS) + static_cast<int>((a / power - 1) * (1 << MANTISSA_BITS));
  }
};

// -1 if x < limit, else 0: the sign of the difference, which CUDA adds in one instruction, where it takes two to add a
// comparison. Between numbers that differ the difference is never rounded to 0.
ADEMAMIX_INLINE int minus_if_below(float x, float limit) { return static_cast<int32_t>(float_bits(x - limit)) >> 31; }

// The table that replaces the search: |x| falls in a bucket with at most one boundary, and the bucket's entry has that
// boundary and the rank above it. Buckets go by the top bits of |x| + LOWEST, which covers all small |x| in few buckets
// and never mixes up an order, so that the result is exact however the sum rounds.
template <bool SIGNED>
struct NearestTable {
  using Buckets = TopBits<SIGNED ? -14 : -13, SIGNED ? 6 : 7>;
  static constexpr int SIZE = Buckets::COUNT;  // 1 + LOWEST is in the bucket of 1

  struct alignas(8) Entry {
    float boundary;
    int32_t rank;
  };
  Entry entries[SIZE];
};

template <bool SIGNED>
constexpr NearestTable<SIGNED> make_nearest_table() {
  using Buckets = typename NearestTable<SIGNED>::Buckets;
  NearestTable<SIGNED> table{};
  int filled = 0;
  // In the unsigned map only 0 itself is stored as 0, so its lowest boundary is left out.
  for (int rank = SIGNED ? 1 : 2; rank <= max_rank(SIGNED); ++rank) {
    const float limit = boundary(SIGNED, rank);
    const int bucket = Buckets::constant_index(limit + Buckets::LOWEST);
    if (bucket < filled) filled = -1;  // two boundaries in a bucket: refused by the compiler
    while (filled < bucket) table.entries[filled++] = {0, rank - 1};
    table.entries[filled++] = {limit, rank};
  }
  while (filled < NearestTable<SIGNED>::SIZE) table.entries[filled++] = {0, max_rank(SIGNED)};
  return table;
}

// The rank nearest to x, in [0, 1].
template <bool SIGNED>
ADEMAMIX_INLINE int nearest_rank(float x, const NearestTable<SIGNED>& table) {
  using Buckets = typename NearestTable<SIGNED>::Buckets;
  const auto entry = table.entries[Buckets::index(x + Buckets::LOWEST)];
  return entry.rank + minus_if_below(x, entry.boundary);
}

// The encoders take finite values with |value| * inverse <= 1, inverse being inverse_absmax(absmax). The code is what
// the result's lowest bits are: to cut off the others costs CUDA an instruction, and packing codes does it anyway.

ADEMAMIX_INLINE int encode_signed(float value, float inverse, const NearestTable<true>& table) {
  const float x = multiply(value, inverse);
  const int rank = nearest_rank(::fabsf(x), table);
  const int code = SIGNED_ZERO_CODE + (x < 0 ? -rank : rank);
  return code < 0 ? 0 : code;  // the map has no -1
}

// A positive value never becomes code 0, for the next step may divide by its root: what is below the smallest positive
// map value goes up to it.
ADEMAMIX_INLINE int encode_unsigned(float value, float inverse, const NearestTable<false>& table) {
  const int rank = nearest_rank(multiply(::fmaxf(value, 0.0f), inverse), table);
  return value > 0 ? rank : 0;
}

// --------------------------------------------------------------------------------------------- stochastically rounded

// The unsigned map as a piecewise linear function, of the rank over the value: within a decade it is linear, and so it
// is between two decades. A position counts 2^-15 ranks and is the low 23 bits of a float from 2^23 on, whose ulp is 1.
// The position of a map value comes out as its rank without a fraction, so that it never changes its code.
constexpr int POSITION_BITS = 15;
constexpr float POSITION_ZERO = 1 << 23;

struct alignas(16) Line {
  float anchor;  // the value where the line begins
  float slope;   // positions per unit of value
  float start;   // POSITION_ZERO + the anchor's position
  float unused;
};

constexpr int MAX_LINES = 16;

template <bool SIGNED>
struct Lines {
  Line lines[MAX_LINES];
  int count;
};

// From 0 to the first value, over each decade, between each two, and to 1.
template <bool SIGNED>
constexpr Lines<SIGNED> make_lines() {
  Lines<SIGNED> result{};
  int begin = 0;
  for (int corner = 0; begin < max_rank(SIGNED); ++corner) {
    const int e = first_decade(SIGNED) + corner / 2;  // corners: the first and the last value of decade e
    int end = (corner % 2 ? (2 << e) - 1 : 1 << e) - (SIGNED ? 0 : 1);
    if (end > max_rank(SIGNED)) end = max_rank(SIGNED);
    if (end == begin) continue;  // a decade of one value
    const double low = map_value(SIGNED, begin), high = map_value(SIGNED, end);
    result.lines[result.count++] = {static_cast<float>(low),
                                    static_cast<float>(((end - begin) << POSITION_BITS) / (high - low)),
                                    POSITION_ZERO + static_cast<float>(begin << POSITION_BITS), 0};
    begin = end;
  }
  return result;
}

// The line of a value, found as the nearest rank is.
struct PositionTable {
  using Buckets = TopBits<-22, 4>;

  struct alignas(8) Entry {
    float begin;  // of the line, if that is in the bucket; below it is the line before
    int32_t line;
  };
  Line lines[MAX_LINES];
  Entry entries[Buckets::COUNT];
};

constexpr PositionTable make_position_table() {
  using Buckets = PositionTable::Buckets;
  PositionTable table{};
  const auto unsigned_lines = make_lines<false>();
  int filled = 0;
  for (int i = 0; i < unsigned_lines.count; ++i) {
    table.lines[i] = unsigned_lines.lines[i];
    if (i == 0) continue;
    const int bucket = Buckets::constant_index(unsigned_lines.lines[i].anchor);
    if (bucket < filled) filled = -1;  // two lines begin in a bucket: refused by the compiler
    while (filled < bucket) table.entries[filled++] = {0, i - 1};
    table.entries[filled++] = {unsigned_lines.lines[i].anchor, i};
  }
  while (filled < Buckets::COUNT) table.entries[filled++] = {0, unsigned_lines.count - 1};
  return table;
}

// Position of x on a line: the subtraction and the fused multiply-add round once each.
ADEMAMIX_INLINE uint32_t position_on(const Line& line, float x) {
  return float_bits(fma(x - line.anchor, line.slope, line.start));
}

// Unbiased between the two map values around x: goes up with probability (x - low) / (high - low), right to 3e-5;
// `random` has 16 bits. As with rounding to nearest, a positive value never becomes code 0. The code is in the bits
// from STOCHASTIC_CODE_SHIFT on.
constexpr int STOCHASTIC_CODE_SHIFT = 16;

ADEMAMIX_INLINE uint32_t encode_unsigned_stochastic(float value, float inverse, uint32_t random,
                                                    const PositionTable& table) {
  const float x = ::fmaxf(multiply(value, inverse), SMALLEST_UNSIGNED);
  const auto entry = table.entries[PositionTable::Buckets::index(x)];
  const uint32_t position = position_on(table.lines[entry.line + minus_if_below(x, entry.begin)], x);
  // Twice the position has 16 bits after the rank; of the float's exponent nothing is left in the rank's eight bits.
  return value > 0 ? 2 * position + random : 0;
}

// -------------------------------------------------------------------------------------------------------- random bits

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
  uint64_t product;  // nvcc would multiply 64-bit numbers by a constant
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

// ------------------------------------------------------------------------------------------------------- linear int16

constexpr float LINEAR_MAX = 32767;

// 1.5 * 2^23: a float of that size has whole numbers for ulps, and its low bits are the two's complement of what was
// added to it.
constexpr float ROUNDING_MAGIC = 12582912;

ADEMAMIX_INLINE uint32_t encode_linear(float value, float inverse) {
  return float_bits(fma(multiply(value, inverse), LINEAR_MAX, ROUNDING_MAGIC));
}

// ----------------------------------------------------------------------------------------------------------- decoding

// A code's value in [-1, 1]; times absmax it is the element. The extreme code thus gives absmax itself.
ADEMAMIX_INLINE float decode_linear(int16_t code) { return multiply(static_cast<float>(code), 1 / LINEAR_MAX); }

struct MapTable {
  float value[256];  // by code
};

constexpr MapTable make_map_table(bool is_signed) {
  MapTable table{};
  for (int code = 0; code < 256; ++code) {
    const int rank = is_signed ? code - SIGNED_ZERO_CODE : code;
    table.value[code] = rank < 0 ? -map_value(is_signed, -rank) : map_value(is_signed, rank);
  }
  return table;
}

// For host code. CUDA: give a __device__ constant the same initializer and copy it to shared memory.
inline constexpr MapTable SIGNED_MAP = make_map_table(true);
inline constexpr MapTable UNSIGNED_MAP = make_map_table(false);
inline constexpr NearestTable<true> SIGNED_NEAREST = make_nearest_table<true>();
inline constexpr NearestTable<false> UNSIGNED_NEAREST = make_nearest_table<false>();
inline constexpr PositionTable UNSIGNED_POSITION = make_position_table();

}  // namespace ademamix

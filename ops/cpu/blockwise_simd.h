// The formats of ../blockwise.h over whole blocks, for AVX-512 and AVX2; elsewhere, and for a ragged block's last
// elements, element by element. The results are the same to the bit.
//
// Gathers are slow, so tables of 16 entries are permutations of a register and map values are computed. Only rounding
// to nearest with AVX2 gathers.
#pragma once

#include "../blockwise.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#define ADEMAMIX_BLOCKWISE_SIMD
#endif

namespace ademamix {

#if defined(ADEMAMIX_BLOCKWISE_SIMD)

// ------------------------------------------------------------------------------- what differs between the vector sizes

#if defined(CPU_CAPABILITY_AVX512)

constexpr int LANES = 16;
using Floats = __m512;
using Ints = __m512i;

ADEMAMIX_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
ADEMAMIX_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
ADEMAMIX_INLINE Floats floats(float a) { return _mm512_set1_ps(a); }
ADEMAMIX_INLINE Ints ints(int a) { return _mm512_set1_epi32(a); }
ADEMAMIX_INLINE Ints bits(Floats a) { return _mm512_castps_si512(a); }
ADEMAMIX_INLINE Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
ADEMAMIX_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
ADEMAMIX_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
ADEMAMIX_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
ADEMAMIX_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
ADEMAMIX_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
ADEMAMIX_INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
ADEMAMIX_INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
ADEMAMIX_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a); }
ADEMAMIX_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
ADEMAMIX_INLINE Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
ADEMAMIX_INLINE Ints maximum(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
ADEMAMIX_INLINE Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
ADEMAMIX_INLINE Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
ADEMAMIX_INLINE Ints absolute(Ints a) { return _mm512_abs_epi32(a); }
ADEMAMIX_INLINE int largest(Ints a) { return _mm512_reduce_max_epi32(a); }
ADEMAMIX_INLINE bool any_below(Ints a, int limit) { return _mm512_cmplt_epi32_mask(a, _mm512_set1_epi32(limit)); }
template <int COUNT>
ADEMAMIX_INLINE Ints shift_left(Ints a) {
  return _mm512_slli_epi32(a, COUNT);
}
template <int COUNT>
ADEMAMIX_INLINE Ints shift_right(Ints a) {
  return _mm512_srli_epi32(a, COUNT);
}
ADEMAMIX_INLINE Ints sign_mask(Ints a) { return _mm512_srai_epi32(a, 31); }

// count + 1 where a >= b.
ADEMAMIX_INLINE Ints count_if_reached(Ints count, Floats a, Floats b) {
  return _mm512_mask_sub_epi32(count, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), count, _mm512_set1_epi32(-1));
}
ADEMAMIX_INLINE Ints zero_unless_positive(Ints a, Floats value) {
  return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ), a);
}
ADEMAMIX_INLINE Floats finite_or_zero(Floats a) {
  const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(a), _mm512_set1_ps(FLT_MAX), _CMP_LE_OQ);
  return _mm512_maskz_mov_ps(finite, a);
}

ADEMAMIX_INLINE Ints load_codes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ADEMAMIX_INLINE Ints load_codes(const int16_t* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ADEMAMIX_INLINE Ints load_random(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ADEMAMIX_INLINE void store_codes(uint8_t* p, Ints codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}
ADEMAMIX_INLINE void store_codes(int16_t* p, Ints codes) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(codes));
}

// By the lowest four bits of the index.
ADEMAMIX_INLINE Floats lookup16(const float* table, Ints index) {
  return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
}

template <int SIZE>
ADEMAMIX_INLINE Floats lookup(const float* table, Ints index) {
  if constexpr (SIZE == 32) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(SIZE / 2));
    return _mm512_mask_blend_ps(upper, lookup<SIZE / 2>(table, index), lookup<SIZE / 2>(table + SIZE / 2, index));
  }
}

// The low halves of the 64-bit lanes multiplied.
constexpr int WIDE_LANES = 8;
ADEMAMIX_INLINE Ints wide(uint64_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
ADEMAMIX_INLINE Ints wide_multiply(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
ADEMAMIX_INLINE Ints wide_upper(Ints a) { return _mm512_srli_epi64(a, 32); }
ADEMAMIX_INLINE Ints wide_add(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
// In the order that store_groups undoes.
ADEMAMIX_INLINE Ints wide_count() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }
ADEMAMIX_INLINE Ints pair(Ints low, Ints high) {
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
ADEMAMIX_INLINE void store_groups(uint16_t* p, Ints first, Ints second) {
  _mm512_storeu_si512(p, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(p + 32, _mm512_unpackhi_epi64(first, second));
}

#else  // AVX2

constexpr int LANES = 8;
using Floats = __m256;
using Ints = __m256i;

ADEMAMIX_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
ADEMAMIX_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
ADEMAMIX_INLINE Floats floats(float a) { return _mm256_set1_ps(a); }
ADEMAMIX_INLINE Ints ints(int a) { return _mm256_set1_epi32(a); }
ADEMAMIX_INLINE Ints bits(Floats a) { return _mm256_castps_si256(a); }
ADEMAMIX_INLINE Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
ADEMAMIX_INLINE Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
ADEMAMIX_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
ADEMAMIX_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
ADEMAMIX_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
ADEMAMIX_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
ADEMAMIX_INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
ADEMAMIX_INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
ADEMAMIX_INLINE float largest(Floats a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
ADEMAMIX_INLINE Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
ADEMAMIX_INLINE Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
ADEMAMIX_INLINE Ints maximum(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
ADEMAMIX_INLINE Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
ADEMAMIX_INLINE Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
ADEMAMIX_INLINE Ints absolute(Ints a) { return _mm256_abs_epi32(a); }
ADEMAMIX_INLINE bool any_below(Ints a, int limit) {
  return _mm256_movemask_epi8(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit), a));
}
ADEMAMIX_INLINE int largest(Ints a) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 1)));
}
template <int COUNT>
ADEMAMIX_INLINE Ints shift_left(Ints a) {
  return _mm256_slli_epi32(a, COUNT);
}
template <int COUNT>
ADEMAMIX_INLINE Ints shift_right(Ints a) {
  return _mm256_srli_epi32(a, COUNT);
}
ADEMAMIX_INLINE Ints sign_mask(Ints a) { return _mm256_srai_epi32(a, 31); }

ADEMAMIX_INLINE Ints count_if_reached(Ints count, Floats a, Floats b) {
  return _mm256_sub_epi32(count, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
ADEMAMIX_INLINE Ints zero_unless_positive(Ints a, Floats value) {
  return _mm256_and_si256(a, _mm256_castps_si256(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ)));
}
ADEMAMIX_INLINE Floats finite_or_zero(Floats a) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
  return _mm256_and_ps(a, _mm256_cmp_ps(magnitude, _mm256_set1_ps(FLT_MAX), _CMP_LE_OQ));
}

ADEMAMIX_INLINE Ints load_codes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
ADEMAMIX_INLINE Ints load_codes(const int16_t* p) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
ADEMAMIX_INLINE Ints load_random(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The low bytes, or low halves, of the 32-bit lanes; the rest of a lane is dropped.
ADEMAMIX_INLINE __m128i low_halves(Ints codes) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_shuffle_epi8(codes, order);
  return _mm_unpacklo_epi64(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
}
ADEMAMIX_INLINE void store_codes(uint8_t* p, Ints codes) {
  const __m128i halves = _mm_and_si128(low_halves(codes), _mm_set1_epi16(0xff));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
ADEMAMIX_INLINE void store_codes(int16_t* p, Ints codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(codes));
}

ADEMAMIX_INLINE Floats lookup16(const float* table, Ints index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

template <int SIZE>
ADEMAMIX_INLINE Floats lookup(const float* table, Ints index) {
  return _mm256_i32gather_ps(table, index, 4);
}

constexpr int WIDE_LANES = 4;
ADEMAMIX_INLINE Ints wide(uint64_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
ADEMAMIX_INLINE Ints wide_multiply(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
ADEMAMIX_INLINE Ints wide_upper(Ints a) { return _mm256_srli_epi64(a, 32); }
ADEMAMIX_INLINE Ints wide_add(Ints a, Ints b) { return _mm256_add_epi64(a, b); }
ADEMAMIX_INLINE Ints wide_count() { return _mm256_setr_epi64x(0, 2, 1, 3); }
ADEMAMIX_INLINE Ints pair(Ints low, Ints high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA); }
ADEMAMIX_INLINE void store_groups(uint16_t* p, Ints first, Ints second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_unpacklo_epi64(first, second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm256_unpackhi_epi64(first, second));
}

#endif

// --------------------------------------------------------------------------------------------------------- the tables

// With the odd number w = 2 position + 1, of exponent e + 1, map_dividend is 9 w - 8 * 2^(e+1). Multiplied by the
// divisor's inverse, as a sum of two floats, it comes out rounded as the quotient is. Rank 0 has an exponent of its
// own, the one below the first decade's, where the inverse is 0.
template <bool SIGNED>
struct DecodeTable {
  float inverse_high[16], inverse_low[16];  // by the lowest four bits of the exponent field, 127 + e + 1
};

template <bool SIGNED>
constexpr DecodeTable<SIGNED> make_decode_table() {
  DecodeTable<SIGNED> table{};
  for (int i = 0; i <= DECADES; ++i) {
    const int e = first_decade(SIGNED) + i;
    const double divisor = i < DECADES ? map_divisor(SIGNED, e) : map_dividend(1 << e);  // at last the value 1
    const int index = (127 + e + 1) % 16;
    table.inverse_high[index] = static_cast<float>(1 / divisor);
    table.inverse_low[index] = static_cast<float>(1 / divisor - table.inverse_high[index]);
  }
  return table;
}

// The lines of a map, found by a value's exponent: between 4^k and 4^(k+1) begin at most two.
template <bool SIGNED>
struct LineTable {
  static constexpr float LOWEST = 1.0f / (1 << 23);  // no line but the first begins below
  float anchor[MAX_LINES], slope[MAX_LINES], start[MAX_LINES];
  // By half the exponent field: ROUNDING_MAGIC + the first line's number, and where the next two begin.
  float line[16], second[16], third[16];
  float next_boundary[SIGNED ? 128 : 256];  // by rank: where the next one begins to be nearest
};

template <bool SIGNED>
constexpr LineTable<SIGNED> make_line_table() {
  LineTable<SIGNED> table{};
  const auto lines = make_lines<SIGNED>();
  for (int i = 0; i < lines.count; ++i) {
    table.anchor[i] = lines.lines[i].anchor;
    table.slope[i] = lines.lines[i].slope;
    table.start[i] = lines.lines[i].start;
  }
  float begin = LineTable<SIGNED>::LOWEST;
  int first = 0;
  for (int field = 104; field < 128; field += 2, begin *= 4) {
    const int index = field / 2 % 16;
    while (first + 1 < lines.count && lines.lines[first + 1].anchor < begin) ++first;
    if (first + 3 < lines.count && lines.lines[first + 3].anchor < 4 * begin) throw "three lines begin in a bucket";
    table.line[index] = ROUNDING_MAGIC + static_cast<float>(first);
    table.second[index] = first + 1 < lines.count ? lines.lines[first + 1].anchor : FLT_MAX;
    table.third[index] = first + 2 < lines.count ? lines.lines[first + 2].anchor : FLT_MAX;
  }
  for (int rank = 0; rank < (SIGNED ? 128 : 256); ++rank) {
    table.next_boundary[rank] = rank < max_rank(SIGNED) ? boundary(SIGNED, rank + 1) : FLT_MAX;
  }
  return table;
}

template <bool SIGNED>
inline constexpr DecodeTable<SIGNED> DECODE = make_decode_table<SIGNED>();
template <bool SIGNED>
inline constexpr LineTable<SIGNED> LINES = make_line_table<SIGNED>();

// -------------------------------------------------------------------------------------------------------- the formulas

// Map values of the codes.
template <bool SIGNED>
ADEMAMIX_INLINE Floats decode_map(Ints codes) {
  const Ints signed_rank = subtract(codes, ints(SIGNED_ZERO_CODE));
  const Ints rank = SIGNED ? absolute(signed_rank) : codes;
  const Floats w = fma(to_floats(rank), floats(2), floats(SIGNED ? 1 : 3));
  const Floats power = as_floats(bit_and(bits(w), ints(0x7f800000)));
  const Ints exponent = shift_right<23>(bits(w));
  const Floats dividend = fma(power, floats(-8), multiply(w, floats(9)));
  const Floats rest = multiply(dividend, lookup16(DECODE<SIGNED>.inverse_low, exponent));
  const Floats value = fma(dividend, lookup16(DECODE<SIGNED>.inverse_high, exponent), rest);
  if (!SIGNED) return value;
  return as_floats(bit_xor(bits(value), bit_and(signed_rank, ints(INT32_MIN))));
}

// Position of x, in [0, 1], on the map's lines, with the exponent field of POSITION_ZERO above it.
template <bool SIGNED>
ADEMAMIX_INLINE Ints position_of(Floats x) {
  constexpr auto& table = LINES<SIGNED>;
  const Ints bucket = shift_right<24>(bits(maximum(x, floats(table.LOWEST))));
  // The lowest bits of ROUNDING_MAGIC + number are the number.
  Ints line = bits(lookup16(table.line, bucket));
  line = count_if_reached(line, x, lookup16(table.second, bucket));
  line = count_if_reached(line, x, lookup16(table.third, bucket));
  const Floats distance = subtract(x, lookup16(table.anchor, line));
  return bits(fma(distance, lookup16(table.slope, line), lookup16(table.start, line)));
}

// The line is right to well under half a rank, so only the boundary above its whole rank is left to look at.
template <bool SIGNED>
__attribute__((noinline)) Ints nearest_rank_by_boundary(Floats x) {
  constexpr int ranks = SIGNED ? 128 : 256;
  constexpr float below_one = 1 - FLT_EPSILON;  // 1 itself has the last rank, which has no boundary above
  const Ints position = position_of<SIGNED>(minimum(x, floats(below_one)));
  const Ints below = bit_and(shift_right<POSITION_BITS>(position), ints(ranks - 1));
  return count_if_reached(below, x, lookup<ranks>(LINES<SIGNED>.next_boundary, below));
}

// A position is off by less than 4, so its own rounding decides unless it is nearly half way between two ranks; one
// vector in some hundred has such a lane.
template <bool SIGNED>
ADEMAMIX_INLINE Ints nearest_rank(Floats x) {
  constexpr int HALF = 1 << (POSITION_BITS - 1), NEAR = 8;
  const Ints position = add(position_of<SIGNED>(x), ints(HALF));
  const Ints beyond = bit_and(add(position, ints(NEAR)), ints(2 * HALF - 1));
  if (any_below(beyond, 2 * NEAR)) return nearest_rank_by_boundary<SIGNED>(x);
  return bit_and(shift_right<POSITION_BITS>(position), ints(255));
}

#endif  // ADEMAMIX_BLOCKWISE_SIMD

// ---------------------------------------------------------------------------------------------------------- the blocks

// Sets what is not finite among the values to 0 and returns the largest magnitude. count <= BLOCK_SIZE, here and below.
inline float clean_and_absmax(float* values, int count) {
  int i = 0;
  float absmax = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  Floats most = floats(0);
  for (; i + LANES <= count; i += LANES) {
    const Floats value = finite_or_zero(load(values + i));
    store(values + i, value);
    most = maximum(most, as_floats(bit_and(bits(value), ints(INT32_MAX))));
  }
  absmax = largest(most);
#endif
  for (; i < count; ++i) {
    values[i] = finite_or_zero(values[i]);
    const float magnitude = ::fabsf(values[i]);
    absmax = magnitude > absmax ? magnitude : absmax;
  }
  return absmax;
}

template <bool SIGNED>
inline void decode_block(const uint8_t* codes, float absmax, int count, float* values) {
  int i = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  for (; i + LANES <= count; i += LANES) {
    store(values + i, multiply(decode_map<SIGNED>(load_codes(codes + i)), floats(absmax)));
  }
#endif
  const auto& map = SIGNED ? SIGNED_MAP : UNSIGNED_MAP;
  for (; i < count; ++i) values[i] = map.value[codes[i]] * absmax;
}

inline void decode_linear_block(const int16_t* codes, float absmax, int count, float* values) {
  for (int i = 0; i < count; ++i) values[i] = decode_linear(codes[i]) * absmax;
}

// The encoders take the finite values that clean_and_absmax leaves, and the absmax that it returns.

inline void encode_signed_block(const float* values, float absmax, int count, uint8_t* codes) {
  const float inverse = inverse_absmax(absmax);
  int i = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  for (; i + LANES <= count; i += LANES) {
    const Floats x = multiply(load(values + i), floats(inverse));
    const Ints sign = sign_mask(bits(x));
    const Ints rank = nearest_rank<true>(as_floats(bit_and(bits(x), ints(INT32_MAX))));
    const Ints code = add(subtract(bit_xor(rank, sign), sign), ints(SIGNED_ZERO_CODE));
    store_codes(codes + i, maximum(code, ints(0)));
  }
#endif
  for (; i < count; ++i) codes[i] = static_cast<uint8_t>(encode_signed(values[i], inverse, SIGNED_NEAREST));
}

inline void encode_unsigned_block(const float* values, float absmax, int count, uint8_t* codes) {
  const float inverse = inverse_absmax(absmax);
  int i = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  for (; i + LANES <= count; i += LANES) {
    const Floats value = load(values + i);
    const Ints rank = nearest_rank<false>(multiply(maximum(value, floats(0)), floats(inverse)));
    store_codes(codes + i, zero_unless_positive(maximum(rank, ints(1)), value));
  }
#endif
  for (; i < count; ++i) codes[i] = static_cast<uint8_t>(encode_unsigned(values[i], inverse, UNSIGNED_NEAREST));
}

// random_half for the elements of a block, whose first group is `group`.
inline void random_block(const RandomKey& key, uint64_t group, uint16_t (&random)[BLOCK_SIZE]) {
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  const Ints multiplier0 = wide(PHILOX_MULTIPLIER[0]), multiplier1 = wide(PHILOX_MULTIPLIER[1]);
  constexpr int VECTORS = BLOCK_SIZE / RANDOM_GROUP / WIDE_LANES;
  Ints c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
  for (int i = 0; i < VECTORS; ++i) {
    c0[i] = wide_add(wide(key.first_group + group + static_cast<uint64_t>(i * WIDE_LANES)), wide_count());
    c1[i] = wide_upper(c0[i]);
    c2[i] = wide(key.step);
    c3[i] = wide(key.stream);
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    for (int i = 0; i < VECTORS; ++i) {  // the upper halves of the lanes stay garbage
      const Ints product0 = wide_multiply(multiplier0, c0[i]), product1 = wide_multiply(multiplier1, c2[i]);
      c0[i] = bit_xor(bit_xor(wide_upper(product1), c1[i]), wide(key0));
      c1[i] = product1;
      c2[i] = bit_xor(bit_xor(wide_upper(product0), c3[i]), wide(key1));
      c3[i] = product0;
    }
    key0 += PHILOX_KEY_STEP[0];
    key1 += PHILOX_KEY_STEP[1];
  }
  for (int i = 0; i < VECTORS; ++i) {
    store_groups(random + i * WIDE_LANES * RANDOM_GROUP, pair(c0[i], c1[i]), pair(c2[i], c3[i]));
  }
#else
  for (int i = 0; i < BLOCK_SIZE; i += RANDOM_GROUP) {
    const RandomWords words = random_words(key, group + static_cast<uint64_t>(i / RANDOM_GROUP));
    for (int j = 0; j < RANDOM_GROUP; ++j) random[i + j] = static_cast<uint16_t>(random_half(words, j));
  }
#endif
}

inline void encode_unsigned_block_stochastic(const float* values, float absmax, int count, const RandomKey& key,
                                             uint64_t first_element, uint8_t* codes) {
  const float inverse = inverse_absmax(absmax);
  uint16_t random[BLOCK_SIZE];
  random_block(key, first_element / RANDOM_GROUP, random);
  int i = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  for (; i + LANES <= count; i += LANES) {
    const Floats value = load(values + i);
    const Floats x = maximum(multiply(value, floats(inverse)), floats(SMALLEST_UNSIGNED));
    const Ints position = position_of<false>(x);
    const Ints rank = shift_right<16>(add(shift_left<1>(position), load_random(random + i)));
    store_codes(codes + i, zero_unless_positive(rank, value));
  }
#endif
  for (; i < count; ++i) {
    const uint32_t word = encode_unsigned_stochastic(values[i], inverse, random[i], UNSIGNED_POSITION);
    codes[i] = static_cast<uint8_t>(word >> STOCHASTIC_CODE_SHIFT);
  }
}

inline void encode_linear_block(const float* values, float absmax, int count, int16_t* codes) {
  const float inverse = inverse_absmax(absmax);
  for (int i = 0; i < count; ++i) codes[i] = static_cast<int16_t>(encode_linear(values[i], inverse) & 0xffff);
}

}  // namespace ademamix

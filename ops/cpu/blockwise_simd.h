// The formats of ../blockwise.h over whole blocks, for AVX-512 and AVX2; elsewhere, and for a ragged block's last
// elements, element by element. The results are the same to the bit.
//
// Gathers are slow, so tables of 16 entries are permutations of a register. AVX-512 needs no others: it computes map
// values and ranks. AVX2 takes two permutations for a table, so it reads the large tables of ../blockwise.h element by
// element, which the loads do beside the arithmetic.
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
constexpr bool TWO_PASSES = false;
using Floats = __m512;
using Ints = __m512i;

ADEMAMIX_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
ADEMAMIX_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
ADEMAMIX_INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
ADEMAMIX_INLINE void store(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }
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

// The same for an index below 64, of a table that begins with 0.
ADEMAMIX_INLINE Ints lookup16(const uint8_t* table, Ints index) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index);
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
constexpr int WIDE_LANES = 8, CHAINS = 4;  // generated at a time: as many as the registers hold
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
// An encoder's first pass stores where to look, its second one looks there. In a single one, the long chain of
// operations of each vector would fill the schedulers before the next vector's could begin.
constexpr bool TWO_PASSES = true;
using Floats = __m256;
using Ints = __m256i;

ADEMAMIX_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
ADEMAMIX_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
ADEMAMIX_INLINE Ints load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ADEMAMIX_INLINE void store(int32_t* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
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
ADEMAMIX_INLINE void store_codes(uint8_t* p, Ints codes) {
  const __m256i order = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_shuffle_epi8(codes, order);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
}
ADEMAMIX_INLINE void store_codes(int16_t* p, Ints codes) {
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_shuffle_epi8(codes, order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_unpacklo_epi64(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1)));
}

ADEMAMIX_INLINE Floats lookup16(const float* table, Ints index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
ADEMAMIX_INLINE Ints lookup16(const uint8_t* table, Ints index) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                             index);
}

// table[index[i]] in lane i.
template <class Index>
ADEMAMIX_INLINE Floats lookup(const float* table, const Index* index) {
  return _mm256_setr_ps(table[index[0]], table[index[1]], table[index[2]], table[index[3]],  //
                        table[index[4]], table[index[5]], table[index[6]], table[index[7]]);
}

// The same of entries of a float and an int.
template <class Entry>
ADEMAMIX_INLINE void lookup(const Entry* entries, const int32_t* index, Floats& value, Ints& number) {
  static_assert(sizeof(Entry) == sizeof(double));
  const auto two = [&](int i) {
    const __m128d first = _mm_load_sd(reinterpret_cast<const double*>(entries + index[i]));
    return _mm_castpd_ps(_mm_loadh_pd(first, reinterpret_cast<const double*>(entries + index[i + 1])));
  };
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(two(0)), two(4), 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(two(2)), two(6), 1);
  value = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0));
  number = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
}

constexpr int WIDE_LANES = 4, CHAINS = 2;
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
  // By half the exponent field: the first line's number, and where the next two begin.
  uint8_t line[16];
  float second[16], third[16];
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
    table.line[index] = static_cast<uint8_t>(first);
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

// The number of x's line, for x from LOWEST to 1.
template <bool SIGNED>
ADEMAMIX_INLINE Ints line_of(Floats x) {
  constexpr auto& table = LINES<SIGNED>;
  const Ints bucket = shift_right<24>(bits(x));
  Ints line = lookup16(table.line, bucket);
  line = count_if_reached(line, x, lookup16(table.second, bucket));
  return count_if_reached(line, x, lookup16(table.third, bucket));
}

// Position of x on its line, with the exponent field of POSITION_ZERO above it.
template <bool SIGNED>
ADEMAMIX_INLINE Ints position_on(Ints line, Floats x) {
  constexpr auto& table = LINES<SIGNED>;
  const Floats distance = subtract(x, lookup16(table.anchor, line));
  return bits(fma(distance, lookup16(table.slope, line), lookup16(table.start, line)));
}

#if defined(CPU_CAPABILITY_AVX512)

// Map values of the codes.
template <bool SIGNED>
ADEMAMIX_INLINE Floats decode_map(const uint8_t* codes) {
  const Ints code = load_codes(codes);
  const Ints signed_rank = subtract(code, ints(SIGNED_ZERO_CODE));
  const Ints rank = SIGNED ? absolute(signed_rank) : code;
  const Floats w = fma(to_floats(rank), floats(2), floats(SIGNED ? 1 : 3));
  const Floats power = as_floats(bit_and(bits(w), ints(0x7f800000)));
  const Ints exponent = shift_right<23>(bits(w));
  const Floats dividend = fma(power, floats(-8), multiply(w, floats(9)));
  const Floats rest = multiply(dividend, lookup16(DECODE<SIGNED>.inverse_low, exponent));
  const Floats value = fma(dividend, lookup16(DECODE<SIGNED>.inverse_high, exponent), rest);
  if (!SIGNED) return value;
  return as_floats(bit_xor(bits(value), bit_and(signed_rank, ints(INT32_MIN))));
}

// The line is right to well under half a rank, so only the boundary above its whole rank is left to look at.
template <bool SIGNED>
__attribute__((noinline)) Ints nearest_rank_by_boundary(Floats x) {
  constexpr int ranks = SIGNED ? 128 : 256;
  constexpr float below_one = 1 - FLT_EPSILON;  // 1 itself has the last rank, which has no boundary above
  x = minimum(x, floats(below_one));
  const Ints line = line_of<SIGNED>(maximum(x, floats(LINES<SIGNED>.LOWEST)));
  const Ints position = position_on<SIGNED>(line, x);
  const Ints below = bit_and(shift_right<POSITION_BITS>(position), ints(ranks - 1));
  return count_if_reached(below, x, lookup<ranks>(LINES<SIGNED>.next_boundary, below));
}

// A position is off by less than 4, so its own rounding decides unless it is nearly half way between two ranks; one
// vector in some hundred has such a lane.
template <bool SIGNED>
ADEMAMIX_INLINE Ints nearest_rank(Floats x, const int32_t*) {
  constexpr int HALF = 1 << (POSITION_BITS - 1), NEAR = 8;
  const Ints line = line_of<SIGNED>(maximum(x, floats(LINES<SIGNED>.LOWEST)));
  const Ints position = add(position_on<SIGNED>(line, x), ints(HALF));
  const Ints beyond = bit_and(add(position, ints(NEAR)), ints(2 * HALF - 1));
  if (any_below(beyond, 2 * NEAR)) return nearest_rank_by_boundary<SIGNED>(x);
  return bit_and(shift_right<POSITION_BITS>(position), ints(255));
}

template <bool SIGNED>
Ints nearest_bucket(Floats x);  // never called: there is no first pass

#else  // AVX2

template <bool SIGNED>
ADEMAMIX_INLINE Floats decode_map(const uint8_t* codes) {
  return lookup(SIGNED ? SIGNED_MAP.value : UNSIGNED_MAP.value, codes);
}

template <bool SIGNED>
ADEMAMIX_INLINE Ints nearest_bucket(Floats x) {
  using Buckets = typename NearestTable<SIGNED>::Buckets;
  return subtract(shift_right<Buckets::SHIFT>(bits(add(x, floats(Buckets::LOWEST)))), ints(Buckets::FIRST));
}

template <bool SIGNED>
ADEMAMIX_INLINE Ints nearest_rank(Floats x, const int32_t* buckets) {
  Floats boundary;
  Ints rank;
  if constexpr (SIGNED) {
    lookup(SIGNED_NEAREST.entries, buckets, boundary, rank);
  } else {
    lookup(UNSIGNED_NEAREST.entries, buckets, boundary, rank);
  }
  return add(rank, sign_mask(bits(subtract(x, boundary))));  // as minus_if_below
}

#endif

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
    store(values + i, multiply(decode_map<SIGNED>(codes + i), floats(absmax)));
  }
#endif
  const auto& map = SIGNED ? SIGNED_MAP : UNSIGNED_MAP;
  for (; i < count; ++i) values[i] = map.value[codes[i]] * absmax;
}

inline void decode_linear_block(const int16_t* codes, float absmax, int count, float* values) {
  for (int i = 0; i < count; ++i) values[i] = decode_linear(codes[i]) * absmax;
}

#if defined(ADEMAMIX_BLOCKWISE_SIMD)
// Stores f(i) for the vectors of a block from element i on, if there is a first pass.
template <class F>
ADEMAMIX_INLINE void first_pass(int count, int32_t* found, const F& f) {
  if constexpr (TWO_PASSES) {
    for (int i = 0; i + LANES <= count; i += LANES) store(found + i, f(i));
  }
}
#endif

// The encoders take the finite values that clean_and_absmax leaves, and the absmax that it returns.

inline void encode_signed_block(const float* values, float absmax, int count, uint8_t* codes) {
  const float inverse = inverse_absmax(absmax);
  int i = 0;
#if defined(ADEMAMIX_BLOCKWISE_SIMD)
  const auto magnitude = [&](Floats x) { return as_floats(bit_and(bits(x), ints(INT32_MAX))); };
  alignas(64) int32_t buckets[BLOCK_SIZE];
  first_pass(count, buckets,
             [&](int i) { return nearest_bucket<true>(magnitude(multiply(load(values + i), floats(inverse)))); });
  for (; i + LANES <= count; i += LANES) {
    const Floats x = multiply(load(values + i), floats(inverse));
    const Ints sign = sign_mask(bits(x));
    const Ints rank = nearest_rank<true>(magnitude(x), buckets + i);
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
  const auto scaled = [&](Floats value) { return multiply(maximum(value, floats(0)), floats(inverse)); };
  alignas(64) int32_t buckets[BLOCK_SIZE];
  first_pass(count, buckets, [&](int i) { return nearest_bucket<false>(scaled(load(values + i))); });
  for (; i + LANES <= count; i += LANES) {
    const Floats value = load(values + i);
    const Ints rank = nearest_rank<false>(scaled(value), buckets + i);
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
  for (int first = 0; first < VECTORS; first += CHAINS) {
    Ints c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int i = 0; i < CHAINS; ++i) {
      c0[i] = wide_add(wide(key.first_group + group + static_cast<uint64_t>((first + i) * WIDE_LANES)), wide_count());
      c1[i] = wide_upper(c0[i]);
      c2[i] = wide(key.step);
      c3[i] = wide(key.stream);
    }
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
      for (int i = 0; i < CHAINS; ++i) {  // the upper halves of the lanes stay garbage
        const Ints product0 = wide_multiply(multiplier0, c0[i]), product1 = wide_multiply(multiplier1, c2[i]);
        c0[i] = bit_xor(bit_xor(wide_upper(product1), c1[i]), wide(key0));
        c1[i] = product1;
        c2[i] = bit_xor(bit_xor(wide_upper(product0), c3[i]), wide(key1));
        c3[i] = product0;
      }
      key0 += PHILOX_KEY_STEP[0];
      key1 += PHILOX_KEY_STEP[1];
    }
    for (int i = 0; i < CHAINS; ++i) {
      uint16_t* target = random + (first + i) * WIDE_LANES * RANDOM_GROUP;
      store_groups(target, pair(c0[i], c1[i]), pair(c2[i], c3[i]));
    }
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
  const auto scaled = [&](Floats value) {
    return maximum(multiply(value, floats(inverse)), floats(SMALLEST_UNSIGNED));
  };
  alignas(64) int32_t lines[BLOCK_SIZE];
  first_pass(count, lines, [&](int i) { return line_of<false>(scaled(load(values + i))); });
  for (; i + LANES <= count; i += LANES) {
    const Floats value = load(values + i);
    const Floats x = scaled(value);
    const Ints position = position_on<false>(TWO_PASSES ? load(lines + i) : line_of<false>(x), x);
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

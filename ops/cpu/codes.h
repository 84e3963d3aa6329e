// Codes and random bits as vectors, from which compilers don't make the instructions that there are for them.
#pragma once

#include "simd.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ademamix {

// As many as there are floats in a vector. Codes are stored from the lowest bits.
using Ints = at::vec::Vectorized<int32_t>;

// load_bits<ELEMENT>(random, i) gives the bits of the elements from i on, or of their groups' elements i ^ ELEMENT.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr int SWAPPED_HALVES = 0x4e;  // of 16 bytes, a group's bits: elements i ^ 4
#endif

#if defined(CPU_CAPABILITY_AVX512)

inline Simd<float> load_codes(const int8_t* p) {
  return at::vec::Vectorized<float>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

inline Simd<float> load_codes(const uint8_t* p) {
  return at::vec::Vectorized<float>(
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

inline Simd<float> load_codes(const int16_t* p) {
  return at::vec::Vectorized<float>(
      _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
}

inline Ints load_words(const int16_t* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Simd<float> to_float(Ints codes) { return at::vec::Vectorized<float>(_mm512_cvtepi32_ps(codes)); }

template <int N>
Ints shift_left(Ints x) {
  return _mm512_slli_epi32(x, N);
}

template <int N>
Ints shift_right(Ints x) {
  return _mm512_srai_epi32(x, N);
}

template <int ELEMENT>
Ints load_bits(const uint16_t* random, int i) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(random + i));
  return _mm512_cvtepu16_epi32(ELEMENT == 0 ? bits : _mm256_shuffle_epi32(bits, SWAPPED_HALVES));
}

inline void store_codes(Ints codes, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}

inline void store_codes(Ints codes, int16_t* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(codes));
}

#elif defined(CPU_CAPABILITY_AVX2)

inline Simd<float> load_codes(const int8_t* p) {
  return at::vec::Vectorized<float>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}

inline Simd<float> load_codes(const uint8_t* p) {
  return at::vec::Vectorized<float>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
}

inline Simd<float> load_codes(const int16_t* p) {
  return at::vec::Vectorized<float>(
      _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}

inline Ints load_words(const int16_t* p) {
  return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Simd<float> to_float(Ints codes) { return at::vec::Vectorized<float>(_mm256_cvtepi32_ps(codes)); }

template <int N>
Ints shift_left(Ints x) {
  return _mm256_slli_epi32(x, N);
}

template <int N>
Ints shift_right(Ints x) {
  return _mm256_srai_epi32(x, N);
}

template <int ELEMENT>
Ints load_bits(const uint16_t* random, int i) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(random + i));
  return _mm256_cvtepu16_epi32(ELEMENT == 0 ? bits : _mm_shuffle_epi32(bits, SWAPPED_HALVES));
}

inline void store_codes(Ints codes, uint8_t* p) {
  const __m256i quads = _mm256_shuffle_epi8(codes, _mm256_set1_epi32(0x0c080400));
  const __m256i both = _mm256_permutevar8x32_epi32(quads, _mm256_set1_epi64x(int64_t{4} << 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(both));
}

inline void store_codes(Ints codes, int16_t* p) {
  const __m256i quads = _mm256_shuffle_epi8(codes, _mm256_set1_epi64x(0x0d0c090805040100));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(quads, 0x08)));
}

#elif defined(__aarch64__) && !defined(CPU_CAPABILITY_SVE)

inline Simd<float> load_codes(const int8_t* p) {
  int32_t codes;
  std::memcpy(&codes, p, sizeof codes);
  const int16x8_t halves = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(codes)));
  return at::vec::Vectorized<float>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves))));
}

inline Simd<float> load_codes(const uint8_t* p) {
  uint32_t codes;
  std::memcpy(&codes, p, sizeof codes);
  const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(codes)));
  return at::vec::Vectorized<float>(vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves))));
}

inline Simd<float> load_codes(const int16_t* p) {
  return at::vec::Vectorized<float>(vcvtq_f32_s32(vmovl_s16(vld1_s16(p))));
}

inline Ints load_words(const int16_t* p) { return vmovl_s16(vld1_s16(p)); }

inline Simd<float> to_float(Ints codes) { return at::vec::Vectorized<float>(vcvtq_f32_s32(codes)); }

template <int N>
Ints shift_left(Ints x) {
  return vshlq_n_s32(x, N);
}

template <int N>
Ints shift_right(Ints x) {
  return vshrq_n_s32(x, N);
}

template <int ELEMENT>
Ints load_bits(const uint16_t* random, int i) {
  static_assert(ELEMENT % 4 == 0);
  return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(random + (i ^ ELEMENT))));
}

inline void store_codes(Ints codes, uint8_t* p) {
  const int16x4_t halves = vmovn_s32(codes);
  const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  std::memcpy(p, &bytes, sizeof bytes);
}

inline void store_codes(Ints codes, int16_t* p) { vst1_s16(p, vmovn_s32(codes)); }

#else

template <class Code>
Simd<float> load_codes(const Code* p) {
  float values[Simd<float>::SIZE];
  for (int64_t i = 0; i < Simd<float>::SIZE; ++i) values[i] = static_cast<float>(p[i]);
  return Simd<float>::load(values);
}

inline Ints load_words(const int16_t* p) {
  int32_t values[Ints::size()];
  for (int64_t i = 0; i < Ints::size(); ++i) values[i] = p[i];
  return Ints::loadu(values);
}

inline Simd<float> to_float(Ints codes) { return at::vec::convert_to_fp_of_same_size<float>(codes); }

template <int N>
Ints shift_left(Ints x) {
  return x << Ints(N);
}

template <int N>
Ints shift_right(Ints x) {
  return x >> Ints(N);
}

template <int ELEMENT>
Ints load_bits(const uint16_t* random, int i) {
  int32_t values[Ints::size()];
  for (int lane = 0; lane < Ints::size(); ++lane) values[lane] = random[(i + lane) ^ ELEMENT];
  return Ints::loadu(values);
}

template <class Code>
void store_codes(Ints codes, Code* p) {
  int32_t values[Ints::size()];
  codes.store(values);
  for (int64_t i = 0; i < Ints::size(); ++i) p[i] = static_cast<Code>(values[i]);
}

#endif

inline void store_codes(Ints codes, int8_t* p) { store_codes(codes, reinterpret_cast<uint8_t*>(p)); }

}  // namespace ademamix

// Loads and stores of codes and random bits as vectors, with instructions that compilers don't find by themselves.
#pragma once

#include "simd.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ademamix {

// As many integers as a vector has floats. The lowest bits are what is stored as codes.
using Ints = at::vec::Vectorized<int32_t>;

template <class V>
Simd<float> to_float(V codes) {
  return at::vec::convert_to_fp_of_same_size<float>(codes);
}

// load_ints(p) loads integers of 8 or 16 bits. load_bits<ELEMENT>(random, i) loads the random bits of the elements from
// i on, with each element i replaced by i ^ ELEMENT.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

constexpr int SWAPPED_HALVES = 0x4e;  // of 16 bytes, a group's bits: elements i ^ 4

inline __m128i load_16_bytes(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

#endif

#if defined(CPU_CAPABILITY_AVX512)

inline Ints load_ints(const int8_t* p) { return _mm512_cvtepi8_epi32(load_16_bytes(p)); }

inline Ints load_ints(const uint8_t* p) { return _mm512_cvtepu8_epi32(load_16_bytes(p)); }

inline Ints load_ints(const int16_t* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
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

inline __m128i load_8_bytes(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

inline Ints load_ints(const int8_t* p) { return _mm256_cvtepi8_epi32(load_8_bytes(p)); }

inline Ints load_ints(const uint8_t* p) { return _mm256_cvtepu8_epi32(load_8_bytes(p)); }

inline Ints load_ints(const int16_t* p) { return _mm256_cvtepi16_epi32(load_16_bytes(p)); }

template <int ELEMENT>
Ints load_bits(const uint16_t* random, int i) {
  const __m128i bits = load_16_bytes(random + i);
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

inline Ints load_ints(const int8_t* p) {
  int32_t codes;
  std::memcpy(&codes, p, sizeof codes);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(codes)))));
}

inline Ints load_ints(const uint8_t* p) {
  uint32_t codes;
  std::memcpy(&codes, p, sizeof codes);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(codes))))));
}

inline Ints load_ints(const int16_t* p) { return vmovl_s16(vld1_s16(p)); }

inline Simd<float> to_float(Ints codes) { return at::vec::Vectorized<float>(vcvtq_f32_s32(codes)); }

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
Ints load_ints(const Code* p) {
  int32_t values[Ints::size()];
  for (int64_t i = 0; i < Ints::size(); ++i) values[i] = p[i];
  return Ints::loadu(values);
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

// Codes as vectors of floats, from which compilers don't make the instructions that there are for them.
#pragma once

#include "simd.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace ademamix {

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

#else

template <class Code>
Simd<float> load_codes(const Code* p) {
  float values[Simd<float>::SIZE];
  for (int64_t i = 0; i < Simd<float>::SIZE; ++i) values[i] = static_cast<float>(p[i]);
  return Simd<float>::load(values);
}

#endif

}  // namespace ademamix

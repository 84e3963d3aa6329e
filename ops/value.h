// The functions of a value type that the shared formulas use. A formula written with them compiles for float and double
// (CUDA threads, scalar host code) and, with the overloads of cpu/simd.h, for SIMD vectors. Every product that is
// added is an explicit fused multiply-add, and everything is built without contraction, so that all builds round alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ADEMAMIX_INLINE __host__ __device__ __forceinline__
#else
#define ADEMAMIX_INLINE inline __attribute__((always_inline))
#endif

namespace ademamix {

// a * b + c, rounded once.
ADEMAMIX_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
ADEMAMIX_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }

// fma() for a factor that may be approximate and too large: value types with such factors round toward zero.
template <class V>
ADEMAMIX_INLINE V fma_down(V a, V b, V c) {
  return fma(a, b, c);
}

ADEMAMIX_INLINE float sqrt(float a) { return ::sqrtf(a); }
ADEMAMIX_INLINE double sqrt(double a) { return ::sqrt(a); }

// scaled_sqrt() returns the root times ROOT_SCALE, which saves an instruction in value types with a scale.
template <class V>
constexpr float ROOT_SCALE = 1;

template <class V>
ADEMAMIX_INLINE V scaled_sqrt(V a) {
  return sqrt(a);
}

// The root of a number in [0, 1]; a denormal number may count as 0.
template <class V>
ADEMAMIX_INLINE V unit_sqrt(V a) {
  return sqrt(a);
}

ADEMAMIX_INLINE float abs(float a) { return ::fabsf(a); }

// Returns `magnitude`, which isn't negative, with the sign of `sign`.
ADEMAMIX_INLINE float copysign(float magnitude, float sign) { return ::copysignf(magnitude, sign); }

// Requires that neither number is NaN.
ADEMAMIX_INLINE float larger(float a, float b) { return a > b ? a : b; }

// Requires a number that is at most 1.
template <class V>
ADEMAMIX_INLINE V at_least_zero(V a) {
  return larger(a, V(0));
}

ADEMAMIX_INLINE float at_most_one(float a) { return a < 1 ? a : 1; }

ADEMAMIX_INLINE float if_positive(float condition, float a, float b) { return condition > 0 ? a : b; }

ADEMAMIX_INLINE uint32_t float_bits(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

ADEMAMIX_INLINE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  std::memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

}  // namespace ademamix

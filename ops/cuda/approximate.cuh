// A float whose roots and quotients are approximate, to within an ulp or two: one instruction each, while exact ones
// take about ten. A value type of the shared formulas (../value.h).
#pragma once

#include "../value.h"

namespace ademamix {

struct Approximate {
  float value;

  Approximate() = default;
  __host__ __device__ __forceinline__ explicit Approximate(float v) : value(v) {}
};

__device__ __forceinline__ Approximate operator*(Approximate a, Approximate b) {
  return Approximate(a.value * b.value);
}

__device__ __forceinline__ Approximate fma(Approximate a, Approximate b, Approximate c) {
  return Approximate(fma(a.value, b.value, c.value));
}

// Rounds toward zero: a root that should be 1 may be 1 + 2^-23 (PTX ISA, sqrt.approx); MAX times that, plus a random
// number, could be MAX + 1, which would be stored as code 0.
__device__ __forceinline__ Approximate fma_down(Approximate a, Approximate b, Approximate c) {
  return Approximate(__fmaf_rz(a.value, b.value, c.value));
}

__device__ __forceinline__ Approximate unit_sqrt(Approximate a) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(a.value));
  return Approximate(root);
#else
  return Approximate(sqrt_approx(a.value));
#endif
}

// The root is scaled, because the instruction treats denormal numbers as 0. Above 2^104 the root is infinite, and such
// an element is stored as the largest of its block.
template <>
constexpr float ROOT_SCALE<Approximate> = 4096;

__device__ __forceinline__ Approximate scaled_sqrt(Approximate a) {
  return unit_sqrt(Approximate(a.value * (ROOT_SCALE<Approximate> * ROOT_SCALE<Approximate>)));
}

__device__ __forceinline__ Approximate abs(Approximate a) { return Approximate(abs(a.value)); }

__device__ __forceinline__ Approximate copysign(Approximate magnitude, Approximate sign) {
  return Approximate(copysign(magnitude.value, sign.value));
}

__device__ __forceinline__ Approximate larger(Approximate a, Approximate b) {
  return Approximate(::fmaxf(a.value, b.value));
}

// These two cost nothing: they are modifiers of the instruction before. NaN becomes 0.
__device__ __forceinline__ Approximate at_most_one(Approximate a) { return Approximate(__saturatef(a.value)); }
__device__ __forceinline__ Approximate at_least_zero(Approximate a) { return at_most_one(a); }

__device__ __forceinline__ Approximate if_positive(Approximate condition, Approximate a, Approximate b) {
  return condition.value > 0 ? a : b;
}

// The update's divisor is never denormal unless eps is: the root of a float is 0 or normal.
__device__ __forceinline__ Approximate operator/(Approximate a, Approximate b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b.value));
  return Approximate(a.value * inverse);
#else
  return Approximate(a.value / b.value);
#endif
}

}  // namespace ademamix

// 16-bit floats in memory: converted to float32, and rounded from it to nearest.
#pragma once

#include "../value.h"

namespace ademamix {

struct bfloat16 {
  uint16_t x;

  bfloat16() = default;
  __device__ __forceinline__ explicit bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    x = static_cast<uint16_t>(value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
  }
  __device__ __forceinline__ explicit operator float() const { return float_from_bits(static_cast<uint32_t>(x) << 16); }
  __device__ __forceinline__ explicit operator double() const { return static_cast<float>(*this); }
};

struct half {
  uint16_t x;

  half() = default;
  __device__ __forceinline__ explicit half(float value) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(x) : "f"(value));
#else
    const auto rounded = static_cast<_Float16>(value);
    std::memcpy(&x, &rounded, sizeof x);
#endif
  }
  __device__ __forceinline__ explicit operator float() const {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
#else
    _Float16 value;
    std::memcpy(&value, &x, sizeof value);
    return static_cast<float>(value);
#endif
  }
  __device__ __forceinline__ explicit operator double() const { return static_cast<float>(*this); }
};

}  // namespace ademamix

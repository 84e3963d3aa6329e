// torch's SIMD vectors as a value type of the shared formulas (value.h).
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../value.h"

namespace ademamix {

template <class T>
struct Simd {
  using Vector = at::vec::Vectorized<T>;
  static constexpr int64_t SIZE = Vector::size();

  Vector v;

  Simd() = default;
  Simd(Vector vector) : v(vector) {}
  explicit Simd(T broadcast) : v(broadcast) {}

  static Simd load(const T* p) { return Vector::loadu(p); }
  static Simd load(const T* p, int64_t n) { return Vector::loadu(p, n); }
  void store(T* p) const { v.store(p); }
  void store(T* p, int64_t n) const { v.store(p, static_cast<int>(n)); }
};

template <class T>
ADEMAMIX_INLINE Simd<T> operator*(Simd<T> a, Simd<T> b) {
  return a.v * b.v;
}

template <class T>
ADEMAMIX_INLINE Simd<T> operator/(Simd<T> a, Simd<T> b) {
  return a.v / b.v;
}

template <class T>
ADEMAMIX_INLINE Simd<T> sqrt(Simd<T> a) {
  return a.v.sqrt();
}

template <class T>
ADEMAMIX_INLINE Simd<T> abs(Simd<T> a) {
  return a.v.abs();
}

template <class T>
ADEMAMIX_INLINE Simd<T> copysign(Simd<T> magnitude, Simd<T> sign) {
  return magnitude.v | (sign.v & typename Simd<T>::Vector(-0.0));
}

template <class T>
ADEMAMIX_INLINE Simd<T> larger(Simd<T> a, Simd<T> b) {
  return at::vec::clamp_min(a.v, b.v);  // maximum() would look for NaN
}

template <class T>
ADEMAMIX_INLINE Simd<T> at_most_one(Simd<T> a) {
  return at::vec::clamp_max(a.v, typename Simd<T>::Vector(1));
}

template <class T>
ADEMAMIX_INLINE Simd<T> if_positive(Simd<T> condition, Simd<T> a, Simd<T> b) {
  using Vector = typename Simd<T>::Vector;
  return Vector::blendv(b.v, a.v, condition.v > Vector(0));
}

template <class T>
ADEMAMIX_INLINE Simd<T> fma(Simd<T> a, Simd<T> b, Simd<T> c) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
  return at::vec::fmadd(a.v, b.v, c.v);
#else  // torch's plain vector rounds the product, which would change every last bit
  T x[Simd<T>::SIZE], y[Simd<T>::SIZE], z[Simd<T>::SIZE];
  a.store(x), b.store(y), c.store(z);
  for (int64_t i = 0; i < Simd<T>::SIZE; ++i) z[i] = fma(x[i], y[i], z[i]);
  return Simd<T>::load(z);
#endif
}

}  // namespace ademamix

// Consecutive elements of a tensor for a SIMD loop: contiguous, in the type T of the arithmetic. Tensors that have this
// form are used in place; those with other dtypes or strides are copied to a buffer that stays in the L1 cache.
#pragma once

#include <algorithm>

#include <ATen/cpu/vec/vec.h>

#include "../ademamix.h"
#include "../view.h"
#include "simd.h"

namespace ademamix {

// The elements of a buffer. Few, so that a thread that fills the buffer of one tensor soon accesses the others again:
// with chunks of 1,024 elements, a bfloat16 parameter's step takes 15% longer.
constexpr int64_t CHUNK = 256;

// Calls f with a value of the C++ type of a floating dtype.
template <class F>
inline void with_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: return f(float{});
  }
}

// Calls f(i, offset) for the elements begin + i, i < n, in row-major order, with their offsets in memory.
template <class F>
inline void for_each_offset(const TensorView& e, int64_t begin, int64_t n, F&& f) {
  const int64_t last = e.dims - 1;  // not below 0: a tensor without dimensions is contiguous
  for (int64_t i = 0; i < n;) {
    int64_t index = begin + i, offset = 0;
    const int64_t column = index % e.sizes[last];
    for (int64_t d = last; d >= 0; --d) {
      offset += index % e.sizes[d] * e.strides[d];
      index /= e.sizes[d];
    }
    const int64_t row_end = std::min(n, i + e.sizes[last] - column);
    for (; i < row_end; ++i, offset += e.strides[last]) f(i, offset);
  }
}

template <class T>
class Chunk {
 public:
  // Whether elements are used in place; else a chunk has at most CHUNK of them.
  static bool is_in_place(const TensorView& elements) {
    return elements.contiguous && elements.dtype == c10::CppTypeToScalarType<T>::value;
  }

  Chunk(const TensorView& elements, int64_t begin, int64_t n) : elements_(elements), begin_(begin), n_(n) {
    if (is_in_place(elements)) {
      data_ = static_cast<T*>(elements.data) + begin;
      return;
    }
    data_ = buffer_;
    with_floating(elements.dtype, [&](auto type) {
      const auto* source = static_cast<const decltype(type)*>(elements.data);
      if (elements.contiguous) {
        at::vec::convert(source + begin, data_, n);
      } else {
        for_each_offset(elements, begin, n,
                        [&](int64_t i, int64_t offset) { data_[i] = static_cast<T>(source[offset]); });
      }
    });
  }

  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  T* data() { return data_; }

  // Stores the values of data() in the tensor, rounded once to its dtype.
  void write_back() {
    if (data_ != buffer_) return;
    with_floating(elements_.dtype, [&](auto type) {
      using S = decltype(type);
      S* target = static_cast<S*>(elements_.data);
      if (!elements_.contiguous) {
        for_each_offset(elements_, begin_, n_,
                        [&](int64_t i, int64_t offset) { target[offset] = static_cast<S>(data_[i]); });
      } else {
        at::vec::convert(data_, target + begin_, n_);
      }
    });
  }

 private:
  const TensorView& elements_;
  int64_t begin_, n_;
  T* data_;
  T buffer_[CHUNK];
};

// One step of n contiguous elements. EXP_AVG: whether there is exp_avg.
template <bool EXP_AVG, class T>
inline void step_chunk(T* param, const T* grad, T* exp_avg, T* exp_avg_slow, T* exp_avg_sq, int64_t n,
                       const StepScalars<T>& scalars) {
  using V = Simd<T>;
  const StepScalars<V> s(scalars);
  int64_t i = 0;
  for (; i + V::SIZE <= n; i += V::SIZE) {
    Element<V> e{V::load(param + i), EXP_AVG ? V::load(exp_avg + i) : V{}, V::load(exp_avg_slow + i),
                 V::load(exp_avg_sq + i)};
    update<EXP_AVG>(e, V::load(grad + i), s);
    e.param.store(param + i);
    if constexpr (EXP_AVG) e.exp_avg.store(exp_avg + i);
    e.exp_avg_slow.store(exp_avg_slow + i);
    e.exp_avg_sq.store(exp_avg_sq + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    Element<V> e{V::load(param + i, rest), EXP_AVG ? V::load(exp_avg + i, rest) : V{}, V::load(exp_avg_slow + i, rest),
                 V::load(exp_avg_sq + i, rest)};
    update<EXP_AVG>(e, V::load(grad + i, rest), s);
    e.param.store(param + i, rest);
    if constexpr (EXP_AVG) e.exp_avg.store(exp_avg + i, rest);
    e.exp_avg_slow.store(exp_avg_slow + i, rest);
    e.exp_avg_sq.store(exp_avg_sq + i, rest);
  }
}

}  // namespace ademamix

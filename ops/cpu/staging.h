// A run of a tensor's elements as a SIMD loop wants it: contiguous, in the type T of the arithmetic. A tensor that has
// that form is used where it lies; other dtypes and strides pass through a buffer that stays in the L1 cache.
#pragma once

#include <algorithm>

#include <ATen/cpu/vec/vec.h>

#include "../view.h"

namespace ademamix {

// Elements. Short, so that a thread that fills buffers, at one stretch of memory, is soon back at the others: with runs
// of 1,024 elements a bfloat16 parameter's step takes 15% longer.
constexpr int64_t RUN = 256;

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
class Run {
 public:
  // Whether elements are used where they lie; else a run has at most RUN of them.
  static bool lies_in_memory(const TensorView& elements) {
    return elements.contiguous && elements.dtype == c10::CppTypeToScalarType<T>::value;
  }

  Run(const TensorView& elements, int64_t begin, int64_t n) : elements_(elements), begin_(begin), n_(n) {
    if (lies_in_memory(elements)) {
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

  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  T* data() { return data_; }

  // Stores what the loop wrote to data(), rounded once to the tensor's dtype.
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
  T buffer_[RUN];
};

}  // namespace ademamix

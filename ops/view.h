#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

namespace ademamix {

using torch::headeronly::ScalarType;

enum class Device : int8_t { CPU, CUDA, OTHER };

// The properties of a tensor that the checks and kernels use. `sizes` and `strides`, in elements, belong to the tensor.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  int64_t numel;
  ScalarType dtype;
  Device device;
  int32_t device_index;
  bool contiguous;  // whether the elements are one after another in memory, in row-major order
};

// Whether the elements are one after another in memory, in any order of the dimensions.
inline bool fills_memory(const TensorView& t) {
  int64_t filled = 1;  // elements, by the dimensions of smaller strides
  while (filled < t.numel) {
    int64_t d = 0;
    while (d < t.dims && (t.sizes[d] == 1 || t.strides[d] != filled)) ++d;
    if (d == t.dims) return false;
    filled *= t.sizes[d];
  }
  return true;
}

// Requires equal shapes.
inline bool same_strides(const TensorView& a, const TensorView& b) {
  for (int64_t d = 0; d < a.dims; ++d)
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

}  // namespace ademamix

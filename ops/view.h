#pragma once

#include <cstdint>

#include <torch/headeronly/core/ScalarType.h>

namespace ademamix {

using torch::headeronly::ScalarType;

enum class Device : int8_t { CPU, CUDA, OTHER };

// A tensor as the checks and kernels see it. sizes and strides (in elements) belong to the tensor.
struct TensorView {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dims;
  int64_t numel;
  ScalarType dtype;
  Device device;
  int32_t device_index;
  bool contiguous;  // the elements lie in memory one after another, in row-major order
};

}  // namespace ademamix

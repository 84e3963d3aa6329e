// Reads the properties of a tensor through the stable ABI, once per call: with hundreds of small tensors, most of a
// step's time goes to such reads.
#pragma once

#include <cstdint>
#include <vector>

#include "torch_stable.h"
#include "view.h"

namespace ademamix {

inline ScalarType scalar_type_of(int32_t dtype) {
  static const int32_t float32 = aoti_torch_dtype_float32();
  // Tensor::scalar_type() looks up the number of every dtype at each call.
  return dtype == float32 ? ScalarType::Float
                          : torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
}

inline TensorView view_of(const Tensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  const AtenTensorHandle handle = tensor.get();
  TensorView view{};
  int32_t dtype, device;
  int64_t *sizes, *strides;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &view.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &view.data));
  view.dtype = scalar_type_of(dtype);
  view.device = device == cpu ? Device::CPU : device == cuda ? Device::CUDA : Device::OTHER;
  if (view.device != Device::CPU) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &view.device_index));
  view.sizes = sizes;
  view.strides = strides;
  view.numel = 1;
  view.contiguous = true;
  for (int64_t d = view.dims - 1; d >= 0; --d) {
    if (sizes[d] != 1 && strides[d] != view.numel) view.contiguous = false;
    view.numel *= sizes[d];
  }
  view.contiguous |= view.numel == 0;
  return view;
}

inline std::vector<TensorView> views_of(TensorList tensors) {
  std::vector<TensorView> views;
  views.reserve(tensors.size());
  for (const Tensor& tensor : tensors) views.push_back(view_of(tensor));
  return views;
}

}  // namespace ademamix

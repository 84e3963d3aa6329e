// From an op's arguments to what the CUDA kernels take.
#pragma once

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../bfloat16.h"
#include "../step_arguments.h"
#include "prologue.cuh"

namespace ademamix {

inline Scalar scalar_of(double value) { return {value, nullptr, nullptr}; }

// The first element.
inline Scalar scalar_of(const Tensor& t) {
  const bool is_double = t.scalar_type() == ScalarType::Double;
  const void* data = t.const_data_ptr();
  return {0, is_double ? nullptr : static_cast<const float*>(data),
          is_double ? static_cast<const double*>(data) : nullptr};
}

inline const float* pointer_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

inline StepNumbers numbers_of(const StepOptions& options) {
  StepNumbers numbers{};
  numbers.lr = std::visit([](const auto& lr) { return scalar_of(lr); }, options.lr);
  numbers.grad_scale = options.grad_scale ? scalar_of(*options.grad_scale) : scalar_of(1.0);
  numbers.h.maximize = options.maximize;
  if (const auto* h = std::get_if<Hyperparameters>(&options.hyperparameters))
    numbers.h = *h;
  else
    numbers.in_memory = numbers.lr;
  numbers.found_inf = pointer_of(options.found_inf);
  return numbers;
}

template <ParamRounding VALUE>
using RoundingConstant = std::integral_constant<ParamRounding, VALUE>;

// Where a step's random bits come from, beside the steps and the elements.
struct RandomSource {
  uint64_t seed;
  const std::vector<int64_t>& streams;
};

// Calls f with a constant of how parameters of dtype P are rounded.
template <class P, class F>
void with_rounding(const Views& remainders, bool stochastic, F&& f) {
  if constexpr (std::is_same_v<P, c10::BFloat16>) {
    if (stochastic) return f(RoundingConstant<ParamRounding::STOCHASTIC>{});
    if (!remainders.empty()) return f(RoundingConstant<ParamRounding::REMAINDER>{});
  }
  f(RoundingConstant<ParamRounding::NEAREST>{});
}

// Calls f with a value of the C++ type of a floating dtype.
template <class F>
void with_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(c10::BFloat16{});
    case ScalarType::Half: return f(c10::Half{});
    default: return f(float{});
  }
}

inline torch::stable::Device device_of(const TensorView& view) {
  using torch::headeronly::DeviceType;
  return view.device == Device::CUDA ? torch::stable::Device(DeviceType::CUDA, view.device_index)
                                     : torch::stable::Device(DeviceType::CPU);
}

inline Tensor tensor_of(const TensorView& view) {
  const auto dims = static_cast<size_t>(view.dims);
  return torch::stable::from_blob(view.data, {view.sizes, dims}, {view.strides, dims}, device_of(view), view.dtype);
}

// On the device of `like`.
inline Tensor empty_tensor(const TensorView& like, const std::vector<int64_t>& sizes,
                           const std::vector<int64_t>& strides, ScalarType dtype) {
  const torch::stable::Device device = device_of(like);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), like.device_index, &handle));
  return Tensor(handle);
}

// Memory for this call's kernels: torch's allocator reuses it in the order of the stream, also within a captured graph.
inline Tensor scratch_memory(const TensorView& like, size_t bytes) {
  return empty_tensor(like, {static_cast<int64_t>(bytes)}, {1}, ScalarType::Byte);
}

// The kernels take the tensors of a parameter as so many elements, one after another, in one order: the row-major one,
// or any that the parameter has. Where a tensor lies otherwise, a copy takes its place.
class CommonOrder {
 public:
  // One list of a call; views of copies replace its own. `written` is what the kernels change.
  struct List {
    Views& views;
    bool written;
  };

  // lists[0] has the parameters; others may be empty.
  CommonOrder(std::initializer_list<List> lists, bool any_order) {
    const Views params = lists.begin()->views;
    for (size_t i = 0; i < params.size(); ++i) {
      const TensorView& first = params[i];
      const bool row_major = first.contiguous || !any_order || !fills_memory(first);
      for (const List& list : lists) {
        if (list.views.empty()) continue;
        TensorView& view = list.views[i];
        if (row_major ? !view.contiguous : !same_strides(first, view)) replace(view, first, row_major, list.written);
      }
    }
  }

  void write_back() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, copy);
  }

 private:
  // By a copy in row-major order or in the order of `first`.
  void replace(TensorView& view, const TensorView& first, bool row_major, bool written) {
    const std::vector<int64_t> sizes(first.sizes, first.sizes + first.dims);
    std::vector<int64_t> strides(first.strides, first.strides + first.dims);
    if (row_major)
      for (int64_t d = first.dims - 1, stride = 1; d >= 0; stride *= first.sizes[d--]) strides[d] = stride;
    const Tensor tensor = tensor_of(view);
    Tensor copy = empty_tensor(view, sizes, strides, view.dtype);
    torch::stable::copy_(copy, tensor);
    view = view_of(copy);
    (written ? written_ : read_).emplace_back(tensor, copy);
  }

  std::vector<std::pair<Tensor, Tensor>> written_, read_;  // tensors and their copies
};

}  // namespace ademamix

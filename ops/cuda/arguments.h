// From an op's arguments to what the CUDA kernels take.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../bfloat16.h"
#include "../check.h"
#include "launches.h"

namespace ademamix {

inline Scalar scalar_of(double value) { return {value, nullptr, nullptr}; }

inline Scalar scalar_of(const Tensor& t) {
  const bool is_double = t.scalar_type() == ScalarType::Double;
  const void* data = t.const_data_ptr();
  return {0, is_double ? nullptr : static_cast<const float*>(data),
          is_double ? static_cast<const double*>(data) : nullptr};
}

inline const float* pointer_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

// As device code names them.
inline const char* type_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "double";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "half";
    default: return "float";
  }
}

inline const char* rounding_name(ParamRounding rounding) {
  switch (rounding) {
    case ParamRounding::STOCHASTIC: return "ParamRounding::STOCHASTIC";
    case ParamRounding::REMAINDER: return "ParamRounding::REMAINDER";
    default: return "ParamRounding::NEAREST";
  }
}

template <int CAPACITY>
const char* capacity_name(const TensorTable<StepRecord, CAPACITY>&) {
  return CAPACITY == SHORT_LIST ? "SHORT_LIST" : "LONG_LIST<StepRecord>";
}

template <int CAPACITY>
const char* capacity_name(const TensorTable<BlockwiseRecord, CAPACITY>&) {
  return CAPACITY == SHORT_LIST ? "SHORT_LIST" : "LONG_LIST<BlockwiseRecord>";
}

template <class First, class... Others>
std::string kernel_expression(const char* kernel, First first, Others... others) {
  std::string text = std::string(kernel) + '<' + first;
  ((text += ", ", text += others), ...);
  return text + '>';
}

inline int element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Whether accesses of so many elements may start there.
inline bool aligned(const void* data, int element_bytes, int elements) {
  return reinterpret_cast<uintptr_t>(data) % access_alignment(element_bytes, elements) == 0;
}

inline ParamRounding param_rounding(const Views& remainders, bool stochastic) {
  return stochastic           ? ParamRounding::STOCHASTIC
         : remainders.empty() ? ParamRounding::NEAREST
                              : ParamRounding::REMAINDER;
}

// Where a step's random bits come from, beside the steps and the elements.
struct RandomSource {
  uint64_t seed;
  const std::vector<int64_t>& streams;
};

// The scalars of each tensor, in device memory that torch's allocator reuses in the order of the stream, also within
// a captured graph.
class StepScalarsOnDevice {
 public:
  // Launches what advances the steps and computes the scalars.
  StepScalarsOnDevice(const CurrentDevice& device, const Tensor& param, const Views& steps, ScalarType compute_dtype,
                      const Hyperparameters& h, Scalar lr, Scalar grad_scale, const float* found_inf)
      : bytes_(compute_dtype == ScalarType::Double ? sizeof(TensorScalars<double>) : sizeof(TensorScalars<float>)),
        memory_(torch::stable::new_empty(param, {static_cast<int64_t>(steps.size() * bytes_)}, ScalarType::Byte)) {
    const auto run = [&](auto capacity) {
      constexpr int CAPACITY = capacity();
      const Kernel kernel = device.gpu().kernel(
          {"prologue.cuh", kernel_expression("prologue_kernel", type_name(compute_dtype),
                                             CAPACITY == SHORT_LIST ? "SHORT_LIST" : "LONG_STEP_LIST")},
          PROLOGUE_THREADS, device.stream());
      for (size_t first = 0; first < steps.size(); first += CAPACITY) {
        StepPointers<CAPACITY> pointers;
        pointers.count = static_cast<int32_t>(std::min<size_t>(steps.size() - first, CAPACITY));
        for (int32_t i = 0; i < pointers.count; ++i) pointers.steps[i] = static_cast<float*>(steps[first + i].data);
        const auto ctas = static_cast<unsigned int>((pointers.count + PROLOGUE_THREADS - 1) / PROLOGUE_THREADS);
        void* const scalars = static_cast<char*>(data()) + first * bytes_;
        launch(kernel, device.stream(), ctas, PROLOGUE_THREADS, pointers, h, lr, grad_scale, found_inf, scalars);
      }
    };
    if (steps.size() <= SHORT_LIST)
      run(std::integral_constant<int, SHORT_LIST>{});
    else
      run(std::integral_constant<int, LONG_STEP_LIST>{});
  }

  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  size_t bytes_;  // of a tensor's
  Tensor memory_;
};

// The kernels take the tensors of a parameter as so many elements, one after another, in one order: the row-major one,
// or any that the parameter has. Where a tensor lies otherwise, a copy takes its place.
class CommonOrder {
 public:
  // One list of a call with its views; those of the copies replace them. `written` is what the kernels change.
  struct List {
    TensorList tensors;
    Views& views;
    bool written;
  };

  // lists[0] has the parameters; others may be empty.
  CommonOrder(std::initializer_list<List> lists, bool any_order) {
    const List& params = *lists.begin();
    for (size_t i = 0; i < params.views.size(); ++i) {
      const TensorView first = params.views[i];
      const bool row_major = first.contiguous || !any_order || !fills_memory(first);
      for (const List& list : lists) {
        if (list.views.empty()) continue;
        TensorView& view = list.views[i];
        if (row_major ? !view.contiguous : !same_strides(first, view))
          replace(list.tensors[i], view, first, row_major, list.written);
      }
    }
  }

  void write_back() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, copy);
  }

 private:
  // By a copy in row-major order or in the order of `first`.
  void replace(const Tensor& tensor, TensorView& view, const TensorView& first, bool row_major, bool written) {
    std::vector<int64_t> strides(first.strides, first.strides + first.dims);
    if (row_major)
      for (int64_t d = first.dims - 1, stride = 1; d >= 0; stride *= first.sizes[d--]) strides[d] = stride;
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(first.dims, first.sizes, strides.data(), dtype, device_type(tensor),
                                                    view.device_index, &handle));
    Tensor copy(handle);
    torch::stable::copy_(copy, tensor);
    view = view_of(copy);
    (written ? written_ : read_).emplace_back(tensor, copy);
  }

  static int32_t device_type(const Tensor& tensor) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    return type;
  }

  std::vector<std::pair<Tensor, Tensor>> written_, read_;  // tensors and their copies
};

}  // namespace ademamix

// Turns an op's arguments into those of the CUDA kernels.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../bfloat16.h"
#include "../step_arguments.h"
#include "launches.h"

namespace ademamix {

inline Scalar scalar_of(double value) { return {value, nullptr, nullptr}; }

// Takes the first element.
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
  if (const Tensor* rows = std::get_if<Tensor>(&options.hyperparameters)) {
    const Scalar first = scalar_of(*rows);
    numbers.float32_rows = first.float32;
    numbers.float64_rows = first.float64;
  }
  numbers.grad_scale = options.grad_scale ? scalar_of(*options.grad_scale) : scalar_of(1.0);
  numbers.found_inf = pointer_of(options.found_inf);
  numbers.maximize = options.maximize;
  return numbers;
}

// Collects the rows of hyperparameters that one launch of the prologue has in its arguments.
template <int ROWS>
class RowsOfTable {
 public:
  RowsOfTable(const StepOptions& options, HyperparameterRow (&table)[ROWS])
      : given_(std::get_if<NumberRows>(&options.hyperparameters)), table_(table) {}

  // Adds a row of the call, whose index in the table is then last(). Returns false if there is no room for it.
  bool add(size_t row) {
    if (!given_) {  // in device memory
      last_ = static_cast<int32_t>(row);
      return true;
    }
    const auto [entry, is_new] = indices_.try_emplace(row, static_cast<int32_t>(indices_.size()));
    if (is_new && entry->second == ROWS) return false;
    if (is_new) {
      const Hyperparameters numbers = given_->row(row);
      table_[entry->second] = {numbers, given_->lrs.empty() ? scalar_of(numbers.lr) : scalar_of(given_->lrs[row])};
    }
    last_ = entry->second;
    return true;
  }

  int32_t last() const { return last_; }

 private:
  const NumberRows* given_;
  HyperparameterRow (&table_)[ROWS];
  std::map<size_t, int32_t> indices_;  // in the table, by the call's rows
  int32_t last_ = 0;
};

// Returns the name of the type in device code.
inline const char* type_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "double";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "half";
    default: return "float";
  }
}

inline const char* bool_name(bool value) { return value ? "true" : "false"; }

inline const char* rounding_name(ParamRounding rounding) {
  switch (rounding) {
    case ParamRounding::STOCHASTIC: return "ParamRounding::STOCHASTIC";
    case ParamRounding::REMAINDER: return "ParamRounding::REMAINDER";
    case ParamRounding::REMAINDER8: return "ParamRounding::REMAINDER8";
    default: return "ParamRounding::NEAREST";
  }
}

// Returns the name, in device code, of the capacity of the argument table for so many tensors.
inline const char* capacity_name(size_t tensors, const char* long_list) {
  return tensors <= SHORT_LIST ? "SHORT_LIST" : long_list;
}

template <class First, class... Others>
std::string kernel_expression(const char* kernel, First first, const Others&... others) {
  std::string text = std::string(kernel) + '<' + first;
  ((text += ", ", text += others), ...);
  return text + '>';
}

inline int element_bytes(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline int remainder_bytes(ParamRounding rounding) { return rounding == ParamRounding::REMAINDER8 ? 1 : 2; }

// Whether vector accesses of so many elements may start at the address.
inline bool aligned(const void* data, int element_bytes, int elements) {
  return reinterpret_cast<uintptr_t>(data) % access_alignment(element_bytes, elements) == 0;
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

// Allocates a tensor on the device of `like`.
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

// Whether the arguments have more than one row of hyperparameters.
inline bool has_many_rows(const StepOptions& options) {
  const NumberRows* const rows = std::get_if<NumberRows>(&options.hyperparameters);
  return rows && rows->count() > 1;
}

inline Kernel prologue_kernel(const CurrentDevice& device, ScalarType param_dtype, const StepOptions& options,
                              size_t tensors) {
  const char* const dtype = type_name(compute_dtype(param_dtype));
  const std::string expression =
      has_many_rows(options)
          ? kernel_expression("prologue_kernel", dtype, "LONG_STEP_LIST<MANY_ROWS>", "MANY_ROWS")
          : kernel_expression("prologue_kernel", dtype, capacity_name(tensors, "LONG_STEP_LIST<1>"), "1");
  return device.gpu().kernel(expression, PROLOGUE_THREADS, device.stream());
}

// The scalars of each tensor, in device memory that torch's allocator reuses in stream order, also in captured graphs.
class StepScalarsOnDevice {
 public:
  // Launches the kernel that increments the steps and computes the scalars.
  StepScalarsOnDevice(const CurrentDevice& device, const TensorView& param, const Views& steps,
                      const StepOptions& options)
      : bytes_(param.dtype == ScalarType::Double ? sizeof(TensorScalars<double>) : sizeof(TensorScalars<float>)),
        memory_(empty_tensor(param, {static_cast<int64_t>(steps.size() * bytes_)}, {1}, ScalarType::Byte)) {
    const Kernel kernel = prologue_kernel(device, param.dtype, options, steps.size());
    if (has_many_rows(options))
      launch_prologues<LONG_STEP_LIST<MANY_ROWS>, MANY_ROWS>(kernel, device.stream(), steps, options);
    else if (steps.size() <= SHORT_LIST)
      launch_prologues<SHORT_LIST, 1>(kernel, device.stream(), steps, options);
    else
      launch_prologues<LONG_STEP_LIST<1>, 1>(kernel, device.stream(), steps, options);
  }

  void* data() const { return memory_.mutable_data_ptr(); }

 private:
  template <int CAPACITY, int ROWS>
  void launch_prologues(const Kernel& kernel, CUstream stream, const Views& steps, const StepOptions& options) const {
    const StepNumbers numbers = numbers_of(options);
    for (size_t first = 0; first < steps.size();) {
      StepTable<CAPACITY, ROWS> table;
      RowsOfTable<ROWS> rows(options, table.hyperparameters);
      int32_t& count = table.count = 0;
      for (size_t i = first; i < steps.size() && count < CAPACITY && rows.add(options.row_of(i)); ++i, ++count) {
        table.steps[count] = static_cast<float*>(steps[i].data);
        table.rows[count] = rows.last();
      }
      const auto ctas = static_cast<unsigned int>((count + PROLOGUE_THREADS - 1) / PROLOGUE_THREADS);
      void* const scalars = static_cast<char*>(data()) + first * bytes_;
      launch(kernel, stream, ctas, PROLOGUE_THREADS, table, numbers, scalars);
      first += static_cast<size_t>(count);
    }
  }

  size_t bytes_;  // of one tensor's scalars
  Tensor memory_;
};

// The kernels need the elements of a parameter's tensors one after another, in the same order: the row-major one, or
// the parameter's own. Tensors in another order are replaced by copies.
class CommonOrder {
 public:
  // One list of a call, in which views of copies replace views. `written`: whether the kernels write to the tensors.
  struct List {
    Views& views;
    bool written;
  };

  // lists[0] has the parameters; the others may be empty.
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
  // Replaces a view by a copy, in row-major order or in the order of `first`.
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

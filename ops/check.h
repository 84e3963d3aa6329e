// Which arguments the ops accept. These checks only raise that a call is invalid; torch_ademamix/ops/check.py has the
// same conditions with error texts, and runs after a native kernel has raised. tests/ops/test_fuzz_arguments.py
// compares the two.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ademamix.h"
#include "bfloat16.h"
#include "blockwise.h"
#include "offsets.h"
#include "tensor_view.h"

namespace ademamix {

inline void require(bool valid, const char* op) {
  if (!valid)
    throw std::runtime_error(std::string(op) +
                             ": invalid arguments; torch_ademamix/ops/arguments.py has what the op accepts");
}

inline bool is_parameter_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// The dtype of a parameter's arithmetic and of its unquantized state.
inline ScalarType compute_dtype(ScalarType param) {
  return param == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device == b.device && a.device_index == b.device_index;
}

inline bool same_shape(const TensorView& a, const TensorView& b) {
  return a.dims == b.dims && std::equal(a.sizes, a.sizes + a.dims, b.sizes);
}

// A tensor expanded over one memory location can't be updated in place.
inline bool overlaps_itself(const TensorView& t) {
  if (t.contiguous) return false;
  for (int64_t d = 0; d < t.dims; ++d)
    if (t.strides[d] == 0 && t.sizes[d] > 1) return true;
  return false;
}

// The rows of hyperparameters of a call as numbers.
struct NumberRows {
  std::vector<double> numbers;  // HYPERPARAMETERS for each row
  TensorList lrs;               // one for each row, which replaces its lr; or none

  size_t count() const { return numbers.size() / HYPERPARAMETERS; }
  Hyperparameters row(size_t i) const { return read_hyperparameters(numbers.data() + i * HYPERPARAMETERS); }
};

// The checks of one call of an op. Each raises if its argument is invalid. Without `offsets`, the lists of state have
// one tensor for each parameter, else flat ones, the arenas, that the parameters share.
class Checker {
 public:
  Checker(const char* op, const Views& params, const std::vector<int64_t>& offsets)
      : op_(op), params_(params), offsets_(offsets) {
    for (const TensorView& param : params)
      require(is_parameter_dtype(param.dtype) && param.dtype == params[0].dtype && same_device(param, params[0]) &&
              !overlaps_itself(param));
    require(offsets.empty() || offsets.size() == OFFSETS_PER_PARAM * params.size());
  }

  // A list with one entry for each parameter.
  void length(size_t n) const { require(n == params_.size()); }

  void grads(const Views& grads) const {
    length(grads.size());
    for (size_t i = 0; i < grads.size(); ++i)
      require(is_parameter_dtype(grads[i].dtype) && grads[i].dtype == grads[0].dtype &&
              same_device(grads[i], params_[i]) && same_shape(grads[i], params_[i]));
  }

  // Whether there are exp_avgs, without which beta1 must be 0.
  bool has_exp_avg(const Views& exp_avgs) {
    has_exp_avg_ = !exp_avgs.empty() || params_.empty();
    return has_exp_avg_;
  }

  // A list of unquantized state: of the parameter's shape, in the dtype of its arithmetic.
  void state(const Views& list) { state(list, compute_dtype(params_.empty() ? ScalarType::Float : params_[0].dtype)); }

  // A list of codes: of the parameter's shape, in one of the dtypes; blocks are counted in row-major order.
  void codes(const Views& list, std::initializer_list<ScalarType> dtypes) {
    if (list.empty()) return length_of_state(0);
    require(std::find(dtypes.begin(), dtypes.end(), list[0].dtype) != dtypes.end());
    list_of_state(list, list[0].dtype,
                  [](const TensorView& t, const TensorView& param) { return same_shape(t, param) && t.contiguous; });
    add_capacity(list, 1);
  }

  // A list of scales, one per block of the parameter.
  void absmaxs(const Views& list) {
    list_of_state(list, ScalarType::Float, [](const TensorView& t, const TensorView& param) {
      return t.numel == block_count(param.numel) && t.contiguous;
    });
    add_capacity(list, BLOCK_SIZE);
  }

  void steps(const Views& steps) {
    list_of_state(steps, ScalarType::Float, [](const TensorView& t, const TensorView&) { return t.numel == 1; });
  }

  // How the new parameters are rounded: to nearest, or, if they are bfloat16, in one of the other ways.
  ParamRounding param_rounding(const Views& remainders, bool stochastic) {
    int remainder_bytes = 0;
    if (!remainders.empty()) {
      remainder_bytes = remainders[0].dtype == ScalarType::Char ? 1 : 2;
      state(remainders, remainder_bytes == 1 ? ScalarType::Char : ScalarType::Short);
      require(!stochastic);  // with remainders, nothing is rounded away
    }
    const bool is_bfloat16 = params_.empty() || params_[0].dtype == ScalarType::BFloat16;
    require(is_bfloat16 || (remainders.empty() && !stochastic));
    return ademamix::param_rounding(remainder_bytes, stochastic);
  }

  // To be called after all lists of state.
  void offsets(const Views& steps) const {
    const std::vector<StateOffsets> offsets = read_offsets(offsets_);
    for (size_t i = 0; i < offsets.size(); ++i) {
      const auto& [arena, first, step] = offsets[i];
      require(arena < capacities_.size());
      require(first >= 0 && first % BLOCK_SIZE == 0 && first <= capacities_[arena] - params_[i].numel);
      require(step >= 0 && step < steps[arena].numel);
    }
  }

  void hyperparameters(const NumberRows& h, const std::vector<int64_t>& rows) const {
    require(!h.numbers.empty() && h.numbers.size() % HYPERPARAMETERS == 0);
    require(h.lrs.empty() || h.lrs.size() == h.count());
    for (const Tensor& lr : h.lrs) scalar(view_of(lr));
    this->rows(rows, static_cast<int64_t>(h.count()));
    for (size_t i = 0; i < h.count(); ++i) row(h.row(i));
  }

  // As a tensor, whose values aren't checked.
  void hyperparameters(const Tensor& tensor, const std::vector<int64_t>& rows) const {
    const TensorView t = view_of(tensor);
    require(is_float32_or_float64(t) && on_params_device(t) && t.contiguous);
    require(t.dims == 2 && t.sizes[0] > 0 && t.sizes[1] == HYPERPARAMETERS);
    this->rows(rows, t.sizes[0]);
  }

  // GradScaler's tensors: one element each, on the parameters' device.
  void scaler(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) const {
    if (grad_scale) scalar(view_of(*grad_scale));
    if (!found_inf) return;
    const TensorView t = view_of(*found_inf);
    require(t.dtype == ScalarType::Float && t.numel == 1 && on_params_device(t));
  }

 private:
  void require(bool valid) const { ademamix::require(valid, op_); }

  void state(const Views& list, ScalarType dtype) {
    list_of_state(list, dtype, [](const TensorView& t, const TensorView& param) {
      return same_shape(t, param) && !overlaps_itself(t);
    });
    add_capacity(list, 1);
  }

  // A list of state: arenas, or a tensor for each parameter with valid(tensor, parameter).
  template <class Valid>
  void list_of_state(const Views& list, ScalarType dtype, const Valid& valid) {
    length_of_state(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      const TensorView &t = list[i], &param = params_[offsets_.empty() ? i : 0];
      require(t.dtype == dtype && same_device(t, param));
      require(offsets_.empty() ? valid(t, param) : t.dims == 1 && t.contiguous);
    }
  }

  // All lists of state have as many arenas.
  void length_of_state(size_t n) {
    if (offsets_.empty()) return length(n);
    if (!arenas_) arenas_ = n;
    require(n == *arenas_);
  }

  // An element of these arenas is for `scale` elements of a parameter.
  void add_capacity(const Views& list, int64_t scale) {
    if (offsets_.empty()) return;
    capacities_.resize(list.size(), INT64_MAX);
    for (size_t i = 0; i < list.size(); ++i) capacities_[i] = std::min(capacities_[i], list[i].numel * scale);
  }

  // Each parameter's row of hyperparameters.
  void rows(const std::vector<int64_t>& rows, int64_t count) const {
    if (rows.empty()) return;
    length(rows.size());
    for (const int64_t row : rows) require(row >= 0 && row < count);
  }

  void row(const Hyperparameters& h) const {
    for (const double beta : {h.beta1, h.beta2, h.beta3}) require(beta >= 0 && beta < 1);
    require(has_exp_avg_ || h.beta1 == 0);
    for (const double x : {h.t_alpha, h.t_beta3, h.schedule_start, h.eps, h.delta, h.kappa, h.t_weight_decay})
      require(x >= 0);
    require(h.log_time_beta2 == 0 || h.delta > 0);
  }

  static bool is_float32_or_float64(const TensorView& t) {
    return t.dtype == ScalarType::Float || t.dtype == ScalarType::Double;
  }

  bool on_params_device(const TensorView& t) const { return params_.empty() || same_device(params_[0], t); }

  void scalar(const TensorView& t) const { require(is_float32_or_float64(t) && t.numel == 1 && on_params_device(t)); }

  const char* op_;
  const Views& params_;
  const std::vector<int64_t>& offsets_;
  bool has_exp_avg_ = true;
  std::optional<size_t> arenas_;     // in each list of state
  std::vector<int64_t> capacities_;  // elements of parameters for which each arena has state
};

inline BlockFormat checked_format(const char* op, int64_t format) {
  require(format >= 0 && format < BLOCK_FORMATS, op);
  return static_cast<BlockFormat>(format);
}

inline ScalarType code_dtype(BlockFormat format) {
  return with_format(format, [](auto f) {
    using Code = typename decltype(f)::Code;
    return std::is_same_v<Code, int8_t> ? ScalarType::Char : sizeof(Code) == 1 ? ScalarType::Byte : ScalarType::Short;
  });
}

// The format of codes that fill their dtype.
inline BlockFormat format_of(ScalarType code_dtype) {
  switch (code_dtype) {
    case ScalarType::Char: return BlockFormat::SIGNED_SQRT_INT8;
    case ScalarType::Byte: return BlockFormat::FOURTH_ROOT_UINT8;
    default: return BlockFormat::LINEAR_INT16;
  }
}

inline BlockFormat check_quantize(const TensorView& x, int64_t format, bool stochastic) {
  const char* op = "quantize_blockwise";
  const BlockFormat checked = checked_format(op, format);
  require(x.dtype == ScalarType::Float, op);
  require(!stochastic || with_format(checked, [](auto f) { return f.POSITION_ZERO != 0; }), op);
  return checked;
}

inline BlockFormat check_dequantize(const TensorView& codes, const TensorView& absmax, int64_t format) {
  const char* op = "dequantize_blockwise";
  const BlockFormat checked = checked_format(op, format);
  require(codes.dtype == code_dtype(checked) && absmax.dtype == ScalarType::Float, op);
  require(same_device(absmax, codes) && absmax.dims == 1 && absmax.numel == block_count(codes.numel), op);
  return checked;
}

}  // namespace ademamix

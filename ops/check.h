// What arguments the ops accept. torch_ademamix/ops/check.py and arguments.py ask the same of fake tensors and of the
// reference kernels, in the same words and order (tests/test_errors.py compares them).
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "ademamix.h"
#include "bfloat16.h"
#include "blockwise.h"
#include "place.h"
#include "tensor_view.h"

namespace ademamix {

// A text or a number as messages have it. Without C++'s streams, whose locales another copy of the standard library
// in the process may have mixed up.
template <class Part>
std::string text_of(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(part));
    return text;
  } else if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::runtime_error((text_of(parts) + ...));
}

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::ComplexHalf: return "torch.complex32";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    default: break;
  }
  std::string name = torch::headeronly::toString(dtype);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return "torch." + name;
}

inline std::string shape_name(const TensorView& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dims; ++d) text += (d ? ", " : "") + std::to_string(t.sizes[d]);
  return text + "]";
}

inline std::string device_name(const TensorView& t) {
  if (t.device == Device::CPU) return "cpu";
  if (t.device == Device::CUDA) return "cuda:" + std::to_string(t.device_index);
  return "another device";
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
  std::vector<double> numbers;  // HYPERPARAMETERS of each row
  TensorList lrs;               // of each row, in place of its lr; or none

  size_t count() const { return numbers.size() / HYPERPARAMETERS; }
  Hyperparameters row(size_t i) const { return read_hyperparameters(numbers.data() + i * HYPERPARAMETERS); }
};

// The checks of one op call; `op` begins every text. Without `places` the lists of state have one tensor for each
// parameter, else flat ones, the arenas, that the parameters share.
class Checker {
 public:
  Checker(const char* op, const Views& params, const std::vector<int64_t>& places)
      : op_(op), params_(params), places_(places) {
    for (size_t i = 0; i < params.size(); ++i) {
      const auto dtype = params[i].dtype;
      if (!is_parameter_dtype(dtype))
        refuse(op_, ": params[", i, "] has dtype ", dtype_name(dtype),
               "; allowed are torch.float32, torch.bfloat16, torch.float16, torch.float64");
      uniform("params", params, i);
      in_place("params", i, params[i]);
    }
    if (const size_t wanted = PLACE_NUMBERS * params.size(); !places.empty() && places.size() != wanted)
      refuse(op_, ": places has length ", places.size(), ", but must have ", wanted, ", ", PLACE_NUMBERS,
             " for each of params, or none");
  }

  void length(const char* name, size_t n) const {
    if (n != params_.size()) refuse(op_, ": ", name, " has length ", n, ", but params has length ", params_.size());
  }

  void grads(const Views& grads) const {
    length("grads", grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      const auto dtype = grads[i].dtype;
      if (!is_parameter_dtype(dtype))
        refuse(op_, ": grads[", i, "] has dtype ", dtype_name(dtype),
               "; allowed are torch.float32, torch.bfloat16, torch.float16, torch.float64");
      uniform("grads", grads, i);
      on_device("grads", i, grads[i], i);
      shaped_as_param("grads", i, grads[i]);
    }
  }

  // Whether there are exp_avgs, without which beta1 must be 0.
  bool has_exp_avg(const Views& exp_avgs) {
    has_exp_avg_ = !exp_avgs.empty() || params_.empty();
    return has_exp_avg_;
  }

  // A list of unquantized state: of the parameter's shape, in the dtype of its arithmetic.
  void state(const char* name, const Views& list) { state(name, list, compute_dtype(param_dtype())); }

  // A list of codes: of the parameter's shape, in one of the dtypes; blocks are counted in row-major order.
  void codes(const char* name, const Views& list, std::initializer_list<ScalarType> dtypes) {
    state_length(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      if (std::find(dtypes.begin(), dtypes.end(), list[i].dtype) == dtypes.end())
        refuse(op_, ": ", name, "[", i, "] has dtype ", dtype_name(list[i].dtype), ", but must be ",
               dtype_name(*dtypes.begin()), dtypes.size() > 1 ? " or " + dtype_name(*(dtypes.end() - 1)) : "");
      uniform(name, list, i);
      on_device(name, i, list[i], param_of(i));
      if (flat(name, i, list[i])) continue;
      shaped_as_param(name, i, list[i]);
      contiguous(name, i, list[i]);
    }
    holds(name, list, 1);
  }

  // A list of scales, one per block of the parameter.
  void absmaxs(const char* name, const Views& list) {
    state_length(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      of_dtype(name, i, list[i], ScalarType::Float);
      on_device(name, i, list[i], param_of(i));
      if (flat(name, i, list[i])) continue;
      if (const int64_t blocks = block_count(params_[i].numel); list[i].numel != blocks)
        refuse(op_, ": ", name, "[", i, "] has ", list[i].numel, " elements, but must have ", blocks,
               ", one per block of params[", i, "]");
      contiguous(name, i, list[i]);
    }
    holds(name, list, BLOCK_SIZE);
  }

  void steps(const Views& steps) {
    state_length("steps", steps);
    for (size_t i = 0; i < steps.size(); ++i) {
      of_dtype("steps", i, steps[i], ScalarType::Float);
      on_device("steps", i, steps[i], param_of(i));
      if (flat("steps", i, steps[i])) continue;
      if (steps[i].numel != 1)
        refuse(op_, ": steps[", i, "] has shape ", shape_name(steps[i]), ", but must hold one element");
    }
  }

  // How the new parameters are rounded: to nearest, or, of bfloat16 ones, in one of the other ways.
  ParamRounding param_rounding(const Views& remainders, bool stochastic) {
    int remainder_bytes = 0;
    if (!remainders.empty()) {
      remainder_bytes = remainders[0].dtype == ScalarType::Char ? 1 : 2;
      state("remainders", remainders, remainder_bytes == 1 ? ScalarType::Char : ScalarType::Short);
      if (stochastic) refuse(op_, ": stochastic_param_rounding is true, but with remainders nothing is rounded away");
    }
    const bool is_bfloat16 = params_.empty() || params_[0].dtype == ScalarType::BFloat16;
    if (!is_bfloat16 && (!remainders.empty() || stochastic))
      refuse(op_, ": params[0] has dtype ", dtype_name(params_[0].dtype), ", but ",
             stochastic ? "stochastic_param_rounding is" : "remainders are", " for torch.bfloat16");
    return ademamix::param_rounding(remainder_bytes, stochastic);
  }

  // After all lists of state.
  void places(const Views& steps) const {
    const std::vector<Place> places = places_of(places_);
    for (size_t i = 0; i < places.size(); ++i) {
      const size_t at = PLACE_NUMBERS * i;
      const auto& [arena, first, step] = places[i];
      if (arena >= steps.size())
        refuse(op_, ": places[", at, "] is ", places_[at], ", but must be in [0, ", steps.size(), ")");
      if (first < 0 || first % BLOCK_SIZE != 0)
        refuse(op_, ": places[", at + 1, "] is ", first, ", but must be a multiple of ", BLOCK_SIZE);
      for (const Capacity& list : capacities_)
        if (first > list.elements[arena] - params_[i].numel)
          refuse(op_, ": places[", at + 1, "] is ", first, ", but ", list.name, "[", arena, "] has room for ",
                 list.elements[arena], " elements, and params[", i, "] has ", params_[i].numel);
      if (step < 0 || step >= steps[arena].numel)
        refuse(op_, ": places[", at + 2, "] is ", step, ", but must be in [0, ", steps[arena].numel, ")");
    }
  }

  void hyperparameters(const NumberRows& h, const std::vector<int64_t>& rows) const {
    if (h.numbers.empty() || h.numbers.size() % HYPERPARAMETERS != 0)
      refuse(op_, ": hyperparameters has length ", h.numbers.size(), ", but must have ", HYPERPARAMETERS,
             " for each row");
    if (h.lrs.size() != 0 && h.lrs.size() != h.count())
      refuse(op_, ": lrs has length ", h.lrs.size(), ", but must have ", h.count(), ", one for each row, or none");
    for (size_t i = 0; i < h.lrs.size(); ++i) float_scalar("lrs[" + std::to_string(i) + "]", view_of(h.lrs[i]));
    this->rows(rows, static_cast<int64_t>(h.count()));
    for (size_t i = 0; i < h.count(); ++i) row(h, i);
  }

  // As a tensor, whose values aren't looked at.
  void hyperparameters(const Tensor& tensor, const std::vector<int64_t>& rows) const {
    const char* name = "hyperparameters";
    const TensorView t = view_of(tensor);
    floating(name, t);
    if (t.dims != 2 || t.sizes[0] == 0 || t.sizes[1] != HYPERPARAMETERS)
      refuse(op_, ": ", name, " has shape ", shape_name(t), ", but must have shape [rows, ", HYPERPARAMETERS, "]");
    if (!t.contiguous) refuse(op_, ": ", name, " must be contiguous");
    on_params_device(name, t);
    this->rows(rows, t.sizes[0]);
  }

  // GradScaler's tensors: one element each, on the parameters' device.
  void scaler(const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) const {
    if (grad_scale) float_scalar("grad_scale", view_of(*grad_scale));
    if (!found_inf) return;
    const TensorView view = view_of(*found_inf);
    if (view.dtype != ScalarType::Float)
      refuse(op_, ": found_inf has dtype ", dtype_name(view.dtype), ", but must be torch.float32");
    one_element("found_inf", view);
  }

 private:
  // Of a list of arenas, how many elements of parameters each has room for.
  struct Capacity {
    const char* name;
    std::vector<int64_t> elements;
  };

  void state(const char* name, const Views& list, ScalarType dtype) {
    state_length(name, list);
    for (size_t i = 0; i < list.size(); ++i) {
      of_dtype(name, i, list[i], dtype);
      on_device(name, i, list[i], param_of(i));
      if (flat(name, i, list[i])) continue;
      shaped_as_param(name, i, list[i]);
      in_place(name, i, list[i]);
    }
    holds(name, list, 1);
  }

  // The first list of state says how many arenas there are.
  void state_length(const char* name, const Views& list) {
    if (places_.empty()) return length(name, list.size());
    if (!first_) first_ = name, arenas_ = list.size();
    if (list.size() != arenas_)
      refuse(op_, ": ", name, " has length ", list.size(), ", but ", first_, " has length ", arenas_);
  }

  // Whether it is an arena.
  bool flat(const char* name, size_t i, const TensorView& t) const {
    if (places_.empty()) return false;
    if (t.dims != 1) refuse(op_, ": ", name, "[", i, "] has shape ", shape_name(t), ", but must have one dimension");
    contiguous(name, i, t);
    return true;
  }

  // `scale` elements of a parameter take one of the arena.
  void holds(const char* name, const Views& list, int64_t scale) {
    if (places_.empty()) return;
    capacities_.push_back({name, {}});
    for (const TensorView& arena : list) capacities_.back().elements.push_back(arena.numel * scale);
  }

  // The parameter that tensor i of a list of state is compared to.
  size_t param_of(size_t i) const { return places_.empty() ? i : 0; }

  // Each parameter's row of hyperparameters.
  void rows(const std::vector<int64_t>& rows, int64_t count) const {
    if (rows.empty()) return;
    length("rows", rows.size());
    for (size_t i = 0; i < rows.size(); ++i)
      if (rows[i] < 0 || rows[i] >= count)
        refuse(op_, ": rows[", i, "] is ", rows[i], ", but must be in [0, ", count, ")");
  }

  void row(const NumberRows& rows, size_t i) const {
    const Hyperparameters h = rows.row(i);
    const auto in_range = [&](const char* name, double value, bool ok, const char* allowed) {
      if (ok) return;
      const std::string which = rows.count() > 1 ? " of row " + std::to_string(i) : "";
      refuse(op_, ": ", name, which, " is ", value, ", but must be ", allowed);
    };
    in_range("beta1", h.beta1, h.beta1 >= 0 && h.beta1 < 1, "in [0, 1)");
    if (!has_exp_avg_) in_range("beta1", h.beta1, h.beta1 == 0, "0 without exp_avgs");
    in_range("beta2", h.beta2, h.beta2 >= 0 && h.beta2 < 1, "in [0, 1)");
    in_range("beta3", h.beta3, h.beta3 >= 0 && h.beta3 < 1, "in [0, 1)");
    in_range("t_alpha", h.t_alpha, h.t_alpha >= 0, "at least 0");
    in_range("t_beta3", h.t_beta3, h.t_beta3 >= 0, "at least 0");
    in_range("schedule_start", h.schedule_start, h.schedule_start >= 0, "at least 0");
    in_range("eps", h.eps, h.eps >= 0, "at least 0");
    in_range("delta", h.delta, h.delta >= 0, "at least 0");
    in_range("log_time_beta2", h.log_time_beta2, h.log_time_beta2 == 0 || h.delta > 0, "0, or delta positive");
    in_range("kappa", h.kappa, h.kappa >= 0, "at least 0");
    in_range("t_weight_decay", h.t_weight_decay, h.t_weight_decay >= 0, "at least 0");
  }

  ScalarType param_dtype() const { return params_.empty() ? ScalarType::Float : params_[0].dtype; }

  void floating(const std::string& name, const TensorView& t) const {
    if (t.dtype != ScalarType::Float && t.dtype != ScalarType::Double)
      refuse(op_, ": ", name, " has dtype ", dtype_name(t.dtype), ", but must be torch.float32 or torch.float64");
  }

  void float_scalar(const std::string& name, const TensorView& t) const {
    floating(name, t);
    one_element(name, t);
  }

  void one_element(const std::string& name, const TensorView& t) const {
    if (t.numel != 1) refuse(op_, ": ", name, " has shape ", shape_name(t), ", but must hold one element");
    on_params_device(name, t);
  }

  void on_params_device(const std::string& name, const TensorView& t) const {
    if (!params_.empty() && !same_device(params_[0], t))
      refuse(op_, ": ", name, " is on ", device_name(t), ", but params are on ", device_name(params_[0]));
  }

  void uniform(const char* name, const Views& list, size_t i) const {
    if (list[i].dtype != list[0].dtype || !same_device(list[i], list[0]))
      refuse(op_, ": ", name, "[", i, "] is ", dtype_name(list[i].dtype), " on ", device_name(list[i]), ", but ", name,
             "[0] is ", dtype_name(list[0].dtype), " on ", device_name(list[0]),
             "; one call takes one dtype and one device");
  }

  void of_dtype(const char* name, size_t i, const TensorView& t, ScalarType dtype) const {
    if (t.dtype != dtype)
      refuse(op_, ": ", name, "[", i, "] has dtype ", dtype_name(t.dtype), ", but must be ", dtype_name(dtype));
  }

  void on_device(const char* name, size_t i, const TensorView& t, size_t param) const {
    if (!same_device(t, params_[param]))
      refuse(op_, ": ", name, "[", i, "] is on ", device_name(t), ", but params[", param, "] is on ",
             device_name(params_[param]));
  }

  void shaped_as_param(const char* name, size_t i, const TensorView& t) const {
    if (!same_shape(t, params_[i]))
      refuse(op_, ": ", name, "[", i, "] has shape ", shape_name(t), ", but params[", i, "] has shape ",
             shape_name(params_[i]));
  }

  void contiguous(const char* name, size_t i, const TensorView& t) const {
    if (!t.contiguous) refuse(op_, ": ", name, "[", i, "] must be contiguous");
  }

  void in_place(const char* name, size_t i, const TensorView& t) const {
    if (overlaps_itself(t))
      refuse(op_, ": ", name, "[", i, "] has elements that share memory, so it can't be updated in place");
  }

  const char* op_;
  const Views& params_;
  const std::vector<int64_t>& places_;
  bool has_exp_avg_ = true;
  const char* first_ = nullptr;  // list of state, and its length
  size_t arenas_ = 0;
  std::vector<Capacity> capacities_;
};

inline BlockFormat checked_format(const char* op, int64_t format) {
  if (format < 0 || format >= BLOCK_FORMATS)
    refuse(op, ": format is ", format, ", but must be in [0, ", BLOCK_FORMATS, ")");
  return static_cast<BlockFormat>(format);
}

inline ScalarType code_dtype(BlockFormat format) {
  return with_format(format, [](auto f) {
    using Code = typename decltype(f)::Code;
    return std::is_same_v<Code, int8_t> ? ScalarType::Char : sizeof(Code) == 1 ? ScalarType::Byte : ScalarType::Short;
  });
}

inline const char* format_name(BlockFormat format) {
  constexpr const char* names[] = {"signed_sqrt_int8", "fourth_root_uint8", "linear_int16",
                                   "linear_int12",     "signed_sqrt_int4",  "fourth_root_uint4"};
  return names[static_cast<int>(format)];
}

// Of codes that fill their dtype.
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
  if (x.dtype != ScalarType::Float) refuse(op, ": x has dtype ", dtype_name(x.dtype), ", but must be torch.float32");
  if (stochastic && with_format(checked, [](auto f) { return f.POSITION_ZERO == 0; }))
    refuse(op, ": seed is given, but ", format_name(checked), " isn't rounded stochastically");
  return checked;
}

inline BlockFormat check_dequantize(const TensorView& codes, const TensorView& absmax, int64_t format) {
  const char* op = "dequantize_blockwise";
  const BlockFormat checked = checked_format(op, format);
  if (codes.dtype != code_dtype(checked))
    refuse(op, ": codes has dtype ", dtype_name(codes.dtype), ", but must be ", dtype_name(code_dtype(checked)));
  if (absmax.dtype != ScalarType::Float)
    refuse(op, ": absmax has dtype ", dtype_name(absmax.dtype), ", but must be torch.float32");
  if (!same_device(absmax, codes))
    refuse(op, ": absmax is on ", device_name(absmax), ", but codes is on ", device_name(codes));
  if (const int64_t blocks = block_count(codes.numel); absmax.dims != 1 || absmax.numel != blocks)
    refuse(op, ": absmax has shape ", shape_name(absmax), ", but must have shape [", blocks,
           "], one per block of codes");
  return checked;
}

}  // namespace ademamix

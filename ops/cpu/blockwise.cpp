// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on the CPU.
#include <tuple>

#include "../step_arguments.h"
#include "arguments.h"
#include "blockwise_kernel.h"
#include "work.h"

namespace ademamix {
namespace {

static_assert(BLOCK_SIZE == UNIT, "no two threads may share a quantization block");

Quantized quantized(const TensorView& codes, const TensorView& absmax) {
  return {codes.data, static_cast<float*>(absmax.data), format_of(codes.dtype)};
}

template <class T>
void run(const BlockwiseLists& lists, const Hyperparameters& h, double lr, double grad_scale, bool stochastic_rounding,
         ParamRounding param_rounding, int64_t seed, const std::vector<int64_t>& streams) {
  const auto scalars = advance<T>(lists.steps, h, lr, grad_scale);
  std::vector<BlockwiseTensor<T>> tensors;
  std::vector<int64_t> numels;
  tensors.reserve(lists.params.size());
  numels.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const RandomKey random = random_key(seed, lists.steps[i], streams[i]);
    const bool has_remainder = param_rounding == ParamRounding::REMAINDER;
    tensors.push_back({{lists.params[i], param_rounding, has_remainder ? lists.remainders[i] : TensorView{}, random},
                       lists.grads[i],
                       quantized(lists.exp_avgs[i], lists.exp_avg_absmaxs[i]),
                       quantized(lists.exp_avg_slows[i], lists.exp_avg_slow_absmaxs[i]),
                       quantized(lists.exp_avg_sqs[i], lists.exp_avg_sq_absmaxs[i]),
                       scalars[i],
                       random,
                       stochastic_rounding});
    numels.push_back(lists.params[i].numel);
  }
  parallel_over_elements(
      numels, [&](size_t i, int64_t begin, int64_t end) { blockwise_step_elements(tensors[i], begin, end); });
}

template <class Lr>
void blockwise_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_absmaxs,
                    TensorList exp_avg_slows, TensorList exp_avg_slow_absmaxs, TensorList exp_avg_sqs,
                    TensorList exp_avg_sq_absmaxs, TensorList steps, Lr lr, double beta1, double beta2, double beta3,
                    double alpha, std::optional<double> t_alpha, std::optional<double> t_beta3, int64_t schedule_start,
                    double eps, double weight_decay, bool maximize, bool stochastic_rounding, TensorList remainders,
                    bool stochastic_param_rounding, int64_t seed, std::vector<int64_t> streams,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Hyperparameters h{beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay, maximize};
  const BlockwiseLists lists{views_of(params),        views_of(grads),
                             views_of(exp_avgs),      views_of(exp_avg_absmaxs),
                             views_of(exp_avg_slows), views_of(exp_avg_slow_absmaxs),
                             views_of(exp_avg_sqs),   views_of(exp_avg_sq_absmaxs),
                             views_of(steps),         views_of(remainders)};
  check_blockwise_step(lists, lr, h, stochastic_param_rounding, streams.size(), grad_scale, found_inf);

  if (params.empty() || (found_inf && read_scalar(*found_inf) != 0)) return;
  const double scale = grad_scale ? read_scalar(*grad_scale) : 1;
  const ParamRounding rounding = param_rounding(lists.remainders, stochastic_param_rounding);
  const auto run_as = lists.params[0].dtype == ScalarType::Double ? run<double> : run<float>;
  run_as(lists, h, read_scalar(lr), scale, stochastic_rounding, rounding, seed, streams);
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x, int64_t format, std::optional<int64_t> seed, int64_t step,
                                              int64_t stream) {
  const BlockFormat block_format = check_quantize(view_of(x), format, seed.has_value());
  const Tensor values = torch::stable::contiguous(x);
  const int64_t numel = values.numel(), blocks = block_count(numel);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), code_dtype(block_format));
  Tensor absmax = torch::stable::new_empty(values, {blocks}, ScalarType::Float);
  const Quantized target{codes.data_ptr(), static_cast<float*>(absmax.data_ptr()), block_format};
  const RandomKey random = random_key(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint32_t>(step), stream);
  parallel_over_elements({numel}, [&](size_t, int64_t begin, int64_t end) {
    quantize_elements(static_cast<const float*>(values.const_data_ptr()), target, seed ? &random : nullptr, begin, end);
  });
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t format) {
  const BlockFormat block_format = check_dequantize(view_of(codes), view_of(absmax), format);
  const Tensor source_codes = torch::stable::contiguous(codes), source_absmax = torch::stable::contiguous(absmax);
  Tensor values = torch::stable::new_empty(source_codes, source_codes.sizes(), ScalarType::Float);
  const Quantized source{source_codes.data_ptr(), static_cast<float*>(source_absmax.data_ptr()), block_format};
  parallel_over_elements({values.numel()}, [&](size_t, int64_t begin, int64_t end) {
    dequantize_elements(source, static_cast<float*>(values.data_ptr()), begin, end);
  });
  return values;
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CPU, m) {
  m.impl("ademamix_blockwise_step_", TORCH_BOX(&ademamix::blockwise_step<double>));
  m.impl("ademamix_blockwise_step_.tensor_lr", TORCH_BOX(&ademamix::blockwise_step<torch::stable::Tensor>));
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on the CPU.
#include <tuple>

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
void run(const BlockwiseLists& lists, const StepOptions& options) {
  const auto scalars = advance<T>(lists.steps, options);
  const ParamRounding rounding = param_rounding(lists.remainders, options.stochastic_param_rounding);
  std::vector<BlockwiseTensor<T>> tensors;
  std::vector<int64_t> numels;
  tensors.reserve(lists.params.size());
  numels.reserve(lists.params.size());
  const bool has_exp_avg = !lists.exp_avgs.empty();
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const RandomKey random = random_key(options.seed, lists.steps[i], options.streams[i]);
    const bool has_remainder = rounding == ParamRounding::REMAINDER;
    tensors.push_back({{lists.params[i], rounding, has_remainder ? lists.remainders[i] : TensorView{}, random},
                       lists.grads[i],
                       has_exp_avg ? quantized(lists.exp_avgs[i], lists.exp_avg_absmaxs[i]) : Quantized{},
                       quantized(lists.exp_avg_slows[i], lists.exp_avg_slow_absmaxs[i]),
                       quantized(lists.exp_avg_sqs[i], lists.exp_avg_sq_absmaxs[i]),
                       scalars[i],
                       random,
                       options.stochastic_rounding});
    numels.push_back(lists.params[i].numel);
  }
  parallel_over_elements(
      numels, [&](size_t i, int64_t begin, int64_t end) { blockwise_step_elements(tensors[i], begin, end); });
}

void blockwise_step(const BlockwiseLists& lists, const StepOptions& options) {
  if (skipped(options)) return;
  const auto run_as = lists.params[0].dtype == ScalarType::Double ? run<double> : run<float>;
  run_as(lists, options);
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
  ademamix::register_blockwise_step<ademamix::blockwise_step>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

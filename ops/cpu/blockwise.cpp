// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on the CPU.
#include <tuple>

#include "arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace ademamix {
namespace {

// `codes` has codes that fill their dtype, or words that have codes of the format `in_words`.
Quantized quantized(const TensorView& codes, const TensorView& absmax, std::optional<BlockFormat> in_words = {}) {
  const BlockFormat format = in_words ? *in_words : format_of(codes.dtype);
  return {codes.data, static_cast<float*>(absmax.data), format, in_words.has_value()};
}

// Sets the moments of parameter i.
template <class T>
void set_moments(BlockwiseTensor<T>& t, const BlockwiseLists& lists, size_t i) {
  const TensorView& slow = lists.exp_avg_slows[i];
  if (lists.exp_avg_in_words())
    t.exp_avg = quantized(slow, lists.exp_avg_absmaxs[i], BlockFormat::SIGNED_SQRT_INT4);
  else if (lists.has_exp_avg())
    t.exp_avg = quantized(lists.exp_avgs[i], lists.exp_avg_absmaxs[i]);
  t.exp_avg_slow = lists.in_words() ? quantized(slow, lists.exp_avg_slow_absmaxs[i], BlockFormat::LINEAR_INT12)
                                    : quantized(slow, lists.exp_avg_slow_absmaxs[i]);
  t.exp_avg_sq = lists.exp_avg_sq_in_words()
                     ? quantized(slow, lists.exp_avg_sq_absmaxs[i], BlockFormat::FOURTH_ROOT_UINT4)
                     : quantized(lists.exp_avg_sqs[i], lists.exp_avg_sq_absmaxs[i]);
}

template <class T>
void run(const BlockwiseLists& lists, const StepOptions& options) {
  const auto scalars = advance<T>(lists.steps, options);
  const ParamRounding rounding = options.param_rounding;
  std::vector<BlockwiseTensor<T>> tensors;
  std::vector<int64_t> numels;
  tensors.reserve(lists.params.size());
  numels.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const RandomKey random = random_key(options.seed, lists.steps[i], options.subsequences[i]);
    tensors.push_back(
        {{lists.params[i], rounding, has_remainder(rounding) ? lists.remainders[i] : TensorView{}, random},
         lists.grads[i],
         {},
         {},
         {},
         scalars[i],
         random,
         options.stochastic_rounding});
    set_moments(tensors.back(), lists, i);
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
                                              int64_t subsequence) {
  const BlockFormat block_format = check_quantize(view_of(x), format, seed.has_value());
  const Tensor values = torch::stable::contiguous(x);
  const int64_t numel = values.numel(), blocks = block_count(numel);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), code_dtype(block_format));
  Tensor absmax = torch::stable::new_empty(values, {blocks}, ScalarType::Float);
  const Quantized target{codes.data_ptr(), static_cast<float*>(absmax.data_ptr()), block_format, false};
  const RandomKey random =
      random_key(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint32_t>(step), subsequence);
  parallel_over_elements({numel}, [&](size_t, int64_t begin, int64_t end) {
    quantize_elements(static_cast<const float*>(values.const_data_ptr()), target, seed ? &random : nullptr, begin, end);
  });
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t format) {
  const BlockFormat block_format = check_dequantize(view_of(codes), view_of(absmax), format);
  const Tensor source_codes = torch::stable::contiguous(codes), source_absmax = torch::stable::contiguous(absmax);
  Tensor values = torch::stable::new_empty(source_codes, source_codes.sizes(), ScalarType::Float);
  const Quantized source{source_codes.data_ptr(), static_cast<float*>(source_absmax.data_ptr()), block_format, false};
  parallel_over_elements({values.numel()}, [&](size_t, int64_t begin, int64_t end) {
    dequantize_elements(source, static_cast<float*>(values.data_ptr()), begin, end);
  });
  return values;
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CPU, m) {
  ademamix::register_step<ademamix::BlockwiseLists, ademamix::blockwise_step>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

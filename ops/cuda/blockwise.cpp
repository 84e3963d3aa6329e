// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on CUDA devices.
#include <tuple>

#include "arguments.h"

namespace ademamix {
namespace {

// A launch has WAVES times as many CTAs as the GPU holds at once: each CTA loads a tensor's scalars once for several
// blocks, and the GPU is still evenly loaded at the end.
#if !defined(ADEMAMIX_BLOCKWISE_WAVES)  // tests have few blocks
#define ADEMAMIX_BLOCKWISE_WAVES 32
#endif
constexpr int WAVES = ADEMAMIX_BLOCKWISE_WAVES;

uint32_t tiles_of(int64_t blocks) { return static_cast<uint32_t>((blocks + TILE_BLOCKS - 1) / TILE_BLOCKS); }

// Returns the name of the format in device code.
const char* struct_name(BlockFormat format) {
  switch (format) {
    case BlockFormat::SIGNED_SQRT_INT8: return "SignedSqrt";
    case BlockFormat::FOURTH_ROOT_UINT8: return "FourthRoot";
    case BlockFormat::LINEAR_INT12: return "Linear12";
    case BlockFormat::SIGNED_SQRT_INT4: return "SignedSqrt4";
    case BlockFormat::FOURTH_ROOT_UINT4: return "FourthRoot4";
    default: return "Linear";
  }
}

struct BlockwiseKernel {
  ScalarType param, grad, slow_code;
  bool has_exp_avg, exp_avg_in_words, exp_avg_sq_in_words;
  bool stochastic_rounding;
  ParamRounding rounding;

  int slow_bytes() const { return slow_code == ScalarType::Short ? 2 : 1; }

  std::string formats() const {
    if (exp_avg_in_words) return "SignedSqrt4, Linear12, FourthRoot";
    if (exp_avg_sq_in_words) return "NoCodes, Linear12, FourthRoot4";
    const std::string slow = slow_bytes() == 2 ? "Linear" : "SignedSqrt";
    return (has_exp_avg ? "SignedSqrt, " : "NoCodes, ") + slow + ", FourthRoot";
  }

  Kernel load(const CurrentDevice& device, size_t tensors) const {
    const char* const capacity = capacity_name(tensors, "LONG_LIST<BlockwiseRecord>");
    const std::string expression =
        kernel_expression("blockwise_step_kernel", type_name(param), type_name(grad), formats(),
                          bool_name(stochastic_rounding), rounding_name(rounding), capacity);
    return device.gpu().kernel(expression, BLOCKWISE_THREADS, device.stream());
  }

  // Whether all pointers but the gradient's are aligned.
  bool is_wide(const BlockwiseRecord& r) const {
    return aligned(r.param, element_bytes(param), LANE_ELEMENTS) && aligned(r.exp_avg, 1, LANE_ELEMENTS) &&
           aligned(r.exp_avg_slow, slow_bytes(), LANE_ELEMENTS) && aligned(r.exp_avg_sq, 1, LANE_ELEMENTS) &&
           aligned(r.remainder, remainder_bytes(rounding), LANE_ELEMENTS);
  }
};

void blockwise_step(BlockwiseLists& lists, const StepOptions& options) {
  const CurrentDevice device(lists.params[0].device_index);
  const BlockwiseKernel kernel{lists.params[0].dtype,       lists.grads[0].dtype,     lists.exp_avg_slows[0].dtype,
                               lists.has_exp_avg(),         lists.exp_avg_in_words(), lists.exp_avg_sq_in_words(),
                               options.stochastic_rounding, options.param_rounding};
  const Kernel loaded = kernel.load(device, lists.params.size());
  if (options.dry_run) {
    prologue_kernel(device, kernel.param, options, lists.steps.size());
    return;
  }

  CommonOrder order({{lists.params, true}, {lists.grads, false}, {lists.remainders, true}}, /*any_order=*/false);
  std::vector<BlockwiseRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    BlockwiseRecord r{
        lists.params[i].data,
        lists.grads[i].data,
        lists.exp_avgs.empty() ? nullptr : static_cast<int8_t*>(lists.exp_avgs[i].data),
        lists.exp_avg_slows[i].data,
        lists.exp_avg_sqs.empty() ? nullptr : static_cast<uint8_t*>(lists.exp_avg_sqs[i].data),
        {static_cast<float*>(lists.exp_avg_slow_absmaxs[i].data), static_cast<float*>(lists.exp_avg_sq_absmaxs[i].data),
         lists.has_exp_avg() ? static_cast<float*>(lists.exp_avg_absmaxs[i].data) : nullptr}};
    if (has_remainder(kernel.rounding)) r.remainder = lists.remainders[i].data;
    r.numel = lists.params[i].numel;
    r.subsequence = options.subsequences[i];
    r.blocks = static_cast<uint32_t>(block_count(r.numel));
    r.wide_blocks = kernel.is_wide(r) ? static_cast<uint32_t>(r.numel / BLOCK_SIZE) : 0;
    r.wide_grads = aligned(r.grad, element_bytes(kernel.grad), LANE_ELEMENTS) ? r.wide_blocks : 0;
    records.push_back(r);
  }
  const auto state_of = [&](const BlockwiseRecord& r) {
    const auto numel = static_cast<size_t>(r.numel), absmax_bytes = r.blocks * sizeof(float);
    return std::array<Range, 7>{{{r.exp_avg, numel},
                                 {r.exp_avg_slow, numel * kernel.slow_bytes()},
                                 {r.exp_avg_sq, numel},
                                 {r.absmaxs[0], absmax_bytes},
                                 {r.absmaxs[1], absmax_bytes},
                                 {r.absmaxs[2], absmax_bytes},
                                 {r.remainder, numel * remainder_bytes(kernel.rounding)}}};
  };
  const auto tiles_of_record = [](const BlockwiseRecord& r) { return tiles_of(r.blocks); };
  const StepScalarsOnDevice scalars(device, lists.params[0], lists.steps, options);
  const void* const on_device = scalars.data();
  const float* const found_inf = pointer_of(options.found_inf);
  for_each_launch(device, records, tiles_of_record, state_of, [&](const auto& table, uint32_t tiles) {
    const auto ctas = static_cast<uint32_t>(WAVES * device.gpu().multiprocessors * loaded.ctas_per_multiprocessor);
    launch(loaded, device.stream(), std::min(tiles, ctas), BLOCKWISE_THREADS, table, on_device,
           static_cast<uint64_t>(options.seed), found_inf);
  });
  order.write_back();
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x, int64_t format, std::optional<int64_t> seed, int64_t step,
                                              int64_t subsequence) {
  const BlockFormat block_format = check_quantize(view_of(x), format, seed.has_value());
  const CurrentDevice device(x.get_device_index());
  const Tensor values = torch::stable::contiguous(x);
  const int64_t numel = values.numel(), blocks = block_count(numel);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), code_dtype(block_format));
  Tensor absmax = torch::stable::new_empty(values, {blocks}, ScalarType::Float);
  if (numel == 0) return {codes, absmax};
  const RandomKey key = random_key(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint32_t>(step), subsequence);
  const auto name = kernel_expression("quantize_kernel", struct_name(block_format), bool_name(seed.has_value()));
  launch(device.gpu().kernel(name, BLOCKWISE_THREADS, device.stream()), device.stream(), tiles_of(blocks),
         BLOCKWISE_THREADS, values.const_data_ptr(), codes.mutable_data_ptr(), absmax.mutable_data_ptr(), numel, key);
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t format) {
  const BlockFormat block_format = check_dequantize(view_of(codes), view_of(absmax), format);
  const CurrentDevice device(codes.get_device_index());
  const Tensor source_codes = torch::stable::contiguous(codes), source_absmax = torch::stable::contiguous(absmax);
  Tensor values = torch::stable::new_empty(source_codes, source_codes.sizes(), ScalarType::Float);
  const int64_t numel = values.numel();
  if (numel == 0) return values;
  const auto name = kernel_expression("dequantize_kernel", struct_name(block_format));
  launch(device.gpu().kernel(name, BLOCKWISE_THREADS, device.stream()), device.stream(), tiles_of(block_count(numel)),
         BLOCKWISE_THREADS, source_codes.const_data_ptr(), source_absmax.const_data_ptr(), values.mutable_data_ptr(),
         numel);
  return values;
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  ademamix::register_step<ademamix::BlockwiseLists, ademamix::blockwise_step>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

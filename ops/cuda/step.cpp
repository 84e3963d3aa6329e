// ademamix_step_ on CUDA devices.
#include "arguments.h"

namespace ademamix {
namespace {

// The dtypes of one call.
struct StepKernel {
  ScalarType param, grad;
  bool has_exp_avg;
  ParamRounding rounding;

  int param_bytes() const { return element_bytes(param); }
  int grad_bytes() const { return element_bytes(grad); }
  int state_bytes() const { return element_bytes(compute_dtype(param)); }
  int width() const { return step_width(param_bytes(), grad_bytes()); }

  Kernel load(const CurrentDevice& device, size_t tensors) const {
    const char* const capacity = capacity_name(tensors, "LONG_LIST<StepRecord>");
    const std::string expression = kernel_expression("step_kernel", type_name(param), type_name(grad),
                                                     bool_name(has_exp_avg), rounding_name(rounding), capacity);
    return device.gpu().kernel(expression, STEP_THREADS, device.stream());
  }

  bool aligned_at(const void* data, int bytes, int64_t element) const {
    return aligned(static_cast<const char*>(data) + element * bytes, bytes, width());
  }

  // Returns the smallest number of elements after which all pointers but the gradient's are aligned.
  int32_t head(const StepRecord& r) const {
    const bool grouped = draws(rounding);  // the elements from 0 on share random words
    for (int element = 0; element < (grouped ? 1 : width()); ++element) {
      if (aligned_at(r.param, param_bytes(), element) &&
          aligned_at(r.exp_avg, state_bytes(), r.exp_avg ? element : 0) &&
          aligned_at(r.exp_avg_slow, state_bytes(), element) && aligned_at(r.exp_avg_sq, state_bytes(), element) &&
          aligned_at(r.remainder, remainder_bytes(rounding), r.remainder ? element : 0))
        return static_cast<int32_t>(std::min<int64_t>(element, r.numel));
    }
    return NO_ALIGNMENT;
  }
};

int64_t tiles_of(const StepRecord& r) {
  const int64_t rest = r.numel - (r.head > 0 ? r.head : 0);
  return r.numel == 0 ? 0 : std::max<int64_t>(1, (rest + STEP_TILE - 1) / STEP_TILE);
}

void step(StepLists& lists, const StepOptions& options) {
  const CurrentDevice device(lists.params[0].device_index);
  const ParamRounding rounding = options.param_rounding;
  const bool has_exp_avg = !lists.exp_avgs.empty();
  const StepKernel kernel{lists.params[0].dtype, lists.grads[0].dtype, has_exp_avg, rounding};
  const Kernel loaded = kernel.load(device, lists.params.size());
  if (options.dry_run) {
    prologue_kernel(device, kernel.param, options, lists.steps.size());
    return;
  }

  CommonOrder order({{lists.params, true},
                     {lists.grads, false},
                     {lists.exp_avgs, true},
                     {lists.exp_avg_slows, true},
                     {lists.exp_avg_sqs, true},
                     {lists.remainders, true}},
                    /*any_order=*/!draws(rounding));
  std::vector<StepRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    StepRecord r{lists.params[i].data, lists.grads[i].data, has_exp_avg ? lists.exp_avgs[i].data : nullptr,
                 lists.exp_avg_slows[i].data, lists.exp_avg_sqs[i].data};
    r.numel = lists.params[i].numel;
    if (has_remainder(rounding)) r.remainder = lists.remainders[i].data;
    if (draws(rounding)) r.subsequence = options.subsequences[i];
    r.head = kernel.head(r);
    r.wide_grad = r.head != NO_ALIGNMENT && kernel.aligned_at(r.grad, kernel.grad_bytes(), r.head);
    records.push_back(r);
  }
  const auto state_of = [&](const StepRecord& r) {
    const size_t bytes = static_cast<size_t>(r.numel) * kernel.state_bytes();
    return std::array<Range, 4>{{{r.exp_avg, bytes},
                                 {r.exp_avg_slow, bytes},
                                 {r.exp_avg_sq, bytes},
                                 {r.remainder, static_cast<size_t>(r.numel) * remainder_bytes(rounding)}}};
  };
  const StepScalarsOnDevice scalars(device, lists.params[0], lists.steps, options);
  const void* const on_device = scalars.data();
  const float* const found_inf = pointer_of(options.found_inf);
  for_each_launch(device, records, tiles_of, state_of, [&](const auto& table, uint32_t tiles) {
    launch(loaded, device.stream(), tiles, STEP_THREADS, table, on_device, static_cast<uint64_t>(options.seed),
           found_inf);
  });
  order.write_back();
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) { ademamix::register_step<ademamix::StepLists, ademamix::step>(m); }

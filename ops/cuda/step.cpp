// ademamix_step_ on CUDA devices.
#include "../step_arguments.h"
#include "arguments.h"

namespace ademamix {
namespace {

// The dtypes of one call.
struct StepKernel {
  ScalarType param, grad;
  ParamRounding rounding;

  int param_bytes() const { return element_bytes(param); }
  int grad_bytes() const { return element_bytes(grad); }
  int state_bytes() const { return element_bytes(compute_dtype(param)); }
  int width() const { return step_width(param_bytes(), grad_bytes()); }

  KernelName name(const char* capacity) const {
    return {"step_kernel.cuh",
            kernel_expression("step_kernel", type_name(param), type_name(grad), rounding_name(rounding), capacity)};
  }

  bool aligned_at(const void* data, int bytes, int64_t element) const {
    return aligned(static_cast<const char*>(data) + element * bytes, bytes, width());
  }

  // The smallest number of elements after which all pointers but the gradient's are aligned.
  int32_t head(const StepRecord& r) const {
    const bool grouped = rounding == ParamRounding::STOCHASTIC;  // the elements from 0 on share random words
    for (int element = 0; element < (grouped ? 1 : width()); ++element) {
      if (aligned_at(r.param, param_bytes(), element) && aligned_at(r.exp_avg, state_bytes(), element) &&
          aligned_at(r.exp_avg_slow, state_bytes(), element) && aligned_at(r.exp_avg_sq, state_bytes(), element) &&
          aligned_at(r.remainder, sizeof(int16_t), r.remainder ? element : 0))
        return static_cast<int32_t>(std::min<int64_t>(element, r.numel));
    }
    return NO_ALIGNMENT;
  }
};

int64_t tiles_of(const StepRecord& r) {
  const int64_t rest = r.numel - (r.head > 0 ? r.head : 0);
  return r.numel == 0 ? 0 : std::max<int64_t>(1, (rest + STEP_TILE - 1) / STEP_TILE);
}

void run_step(const CurrentDevice& device, const StepLists& lists, const StepScalarsOnDevice& scalars,
              ParamRounding rounding, const RandomSource& random, const float* found_inf) {
  const StepKernel kernel{lists.params[0].dtype, lists.grads[0].dtype, rounding};
  std::vector<StepRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    StepRecord r{lists.params[i].data, lists.grads[i].data, lists.exp_avgs[i].data, lists.exp_avg_slows[i].data,
                 lists.exp_avg_sqs[i].data};
    r.numel = lists.params[i].numel;
    if (rounding == ParamRounding::REMAINDER) r.remainder = static_cast<int16_t*>(lists.remainders[i].data);
    if (rounding == ParamRounding::STOCHASTIC) r.stream = random.streams[i];
    r.head = kernel.head(r);
    r.wide_grad = r.head != NO_ALIGNMENT && kernel.aligned_at(r.grad, kernel.grad_bytes(), r.head);
    records.push_back(r);
  }
  const auto state_of = [&](const StepRecord& r) {
    const size_t bytes = static_cast<size_t>(r.numel) * kernel.state_bytes();
    return std::array<Range, 4>{{{r.exp_avg, bytes},
                                 {r.exp_avg_slow, bytes},
                                 {r.exp_avg_sq, bytes},
                                 {r.remainder, static_cast<size_t>(r.numel) * sizeof(int16_t)}}};
  };
  const void* const on_device = scalars.data();
  for_each_launch(device, records, tiles_of, state_of, [&](const auto& table, uint32_t tiles) {
    const Kernel loaded = device.gpu().kernel(kernel.name(capacity_name(table)), STEP_THREADS, device.stream());
    launch(loaded, device.stream(), tiles, STEP_THREADS, table, on_device, random.seed, found_inf);
  });
}

template <class Lr>
void step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_slows, TensorList exp_avg_sqs,
          TensorList steps, Lr lr, double beta1, double beta2, double beta3, double alpha,
          std::optional<double> t_alpha, std::optional<double> t_beta3, int64_t schedule_start, double eps,
          double weight_decay, bool maximize, TensorList remainders, bool stochastic_param_rounding, int64_t seed,
          std::vector<int64_t> streams, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Hyperparameters h{beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay, maximize};
  StepLists lists{views_of(params),      views_of(grads), views_of(exp_avgs),  views_of(exp_avg_slows),
                  views_of(exp_avg_sqs), views_of(steps), views_of(remainders)};
  check_step(lists, lr, h, stochastic_param_rounding, streams.size(), grad_scale, found_inf);
  if (params.empty()) return;

  const CurrentDevice device(lists.params[0].device_index);
  CommonOrder order({{params, lists.params, true},
                     {grads, lists.grads, false},
                     {exp_avgs, lists.exp_avgs, true},
                     {exp_avg_slows, lists.exp_avg_slows, true},
                     {exp_avg_sqs, lists.exp_avg_sqs, true},
                     {remainders, lists.remainders, true}},
                    /*any_order=*/!stochastic_param_rounding);
  const float* const skip = pointer_of(found_inf);
  const StepScalarsOnDevice scalars(device, params[0], lists.steps, compute_dtype(lists.params[0].dtype), h,
                                    scalar_of(lr), grad_scale ? scalar_of(*grad_scale) : scalar_of(1.0), skip);
  run_step(device, lists, scalars, param_rounding(lists.remainders, stochastic_param_rounding),
           {static_cast<uint64_t>(seed), streams}, skip);
  order.write_back();
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  m.impl("ademamix_step_", TORCH_BOX(&ademamix::step<double>));
  m.impl("ademamix_step_.tensor_lr", TORCH_BOX(&ademamix::step<torch::stable::Tensor>));
}

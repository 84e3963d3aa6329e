// ademamix_step_ on CUDA devices.
#include "../step_arguments.h"
#include "arguments.h"
#include "paging.h"
#include "runtime.h"
#include "step_kernel.cuh"

namespace ademamix {
namespace {

template <class P, class G, ParamRounding ROUNDING>
void launch_steps(const CurrentDevice& device, const StepLists& lists, const RandomSource& random,
                  const TensorScalars<typename StepTypes<P, G>::T>* scalars, const float* found_inf) {
  std::vector<StepRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    StepRecord r{lists.params[i].data, lists.grads[i].data, lists.exp_avgs[i].data, lists.exp_avg_slows[i].data,
                 lists.exp_avg_sqs[i].data};
    r.numel = lists.params[i].numel;
    if constexpr (ROUNDING == ParamRounding::REMAINDER) r.remainder = static_cast<int16_t*>(lists.remainders[i].data);
    if constexpr (ROUNDING == ParamRounding::STOCHASTIC) r.stream = random.streams[i];
    r.head = step_head<P, G, ROUNDING>(r);
    records.push_back(r);
  }
  const auto state_of = [](const StepRecord& r) {
    return std::array<const void*, 4>{r.exp_avg, r.exp_avg_slow, r.exp_avg_sq, r.remainder};
  };
  for_each_launch(device, records, step_tiles, state_of, [&](const TensorTable<StepRecord>& table, uint32_t tiles) {
    launch(device.stream(), step_kernel<P, G, ROUNDING>, tiles, STEP_THREADS, table, scalars, random.seed, found_inf);
  });
}

template <class T>
void run_step(const CurrentDevice& device, const StepLists& lists, const Tensor& param, const Hyperparameters& h,
              Scalar lr, Scalar grad_scale, const float* found_inf, bool stochastic, const RandomSource& random) {
  const Tensor scratch = scratch_memory(param, lists.steps.size() * sizeof(TensorScalars<T>));
  auto* scalars = static_cast<TensorScalars<T>*>(scratch.data_ptr());
  launch_prologues(device.stream(), lists.steps, h, lr, grad_scale, found_inf, scalars);
  with_floating(lists.params[0].dtype, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<T, double> == std::is_same_v<P, double>) {
      with_floating(lists.grads[0].dtype, [&](auto g) {
        with_rounding<P>(lists.remainders, stochastic, [&](auto rounding) {
          launch_steps<P, decltype(g), rounding()>(device, lists, random, scalars, found_inf);
        });
      });
    }
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
  const auto run = lists.params[0].dtype == ScalarType::Double ? run_step<double> : run_step<float>;
  run(device, lists, params[0], h, scalar_of(lr), grad_scale ? scalar_of(*grad_scale) : scalar_of(1.0),
      pointer_of(found_inf), stochastic_param_rounding, {static_cast<uint64_t>(seed), streams});
  order.write_back();
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  m.impl("ademamix_step_", TORCH_BOX(&ademamix::step<double>));
  m.impl("ademamix_step_.tensor_lr", TORCH_BOX(&ademamix::step<torch::stable::Tensor>));
}

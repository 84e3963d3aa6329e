// ademamix_step_ on the CPU.
#include "../step_arguments.h"
#include "arguments.h"
#include "step_kernel.h"
#include "work.h"

namespace ademamix {
namespace {

template <class T>
void run(const StepLists& lists, const Hyperparameters& h, double lr, double grad_scale, ParamRounding rounding,
         int64_t seed, const std::vector<int64_t>& streams) {
  const auto scalars = advance<T>(lists.steps, h, lr, grad_scale);
  std::vector<StepTensor<T>> tensors;
  std::vector<int64_t> numels;
  tensors.reserve(lists.params.size());
  numels.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    StepTensor<T> t{{lists.params[i], rounding}, lists.grads[i],       lists.exp_avgs[i],
                    lists.exp_avg_slows[i],      lists.exp_avg_sqs[i], scalars[i]};
    if (rounding == ParamRounding::STOCHASTIC) {
      t.param.random = random_key(seed, lists.steps[i], streams[i]);  // of the elements in row-major order
    } else {
      t.param.remainder = rounding == ParamRounding::REMAINDER ? lists.remainders[i] : t.param.tensor;
      use_common_order({&t.param.tensor, &t.param.remainder, &t.grad, &t.exp_avg, &t.exp_avg_slow, &t.exp_avg_sq});
    }
    tensors.push_back(t);
    numels.push_back(lists.params[i].numel);
  }
  parallel_over_elements(numels, [&](size_t i, int64_t begin, int64_t end) { step_elements(tensors[i], begin, end); });
}

template <class Lr>
void step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_slows, TensorList exp_avg_sqs,
          TensorList steps, Lr lr, double beta1, double beta2, double beta3, double alpha,
          std::optional<double> t_alpha, std::optional<double> t_beta3, int64_t schedule_start, double eps,
          double weight_decay, bool maximize, TensorList remainders, bool stochastic_param_rounding, int64_t seed,
          std::vector<int64_t> streams, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Hyperparameters h{beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay, maximize};
  const StepLists lists{views_of(params),      views_of(grads), views_of(exp_avgs),  views_of(exp_avg_slows),
                        views_of(exp_avg_sqs), views_of(steps), views_of(remainders)};
  check_step(lists, lr, h, stochastic_param_rounding, streams.size(), grad_scale, found_inf);

  if (params.empty() || (found_inf && read_scalar(*found_inf) != 0)) return;
  const double scale = grad_scale ? read_scalar(*grad_scale) : 1;
  const ParamRounding rounding = param_rounding(lists.remainders, stochastic_param_rounding);
  const auto run_as = lists.params[0].dtype == ScalarType::Double ? run<double> : run<float>;
  run_as(lists, h, read_scalar(lr), scale, rounding, seed, streams);
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CPU, m) {
  m.impl("ademamix_step_", TORCH_BOX(&ademamix::step<double>));
  m.impl("ademamix_step_.tensor_lr", TORCH_BOX(&ademamix::step<torch::stable::Tensor>));
}

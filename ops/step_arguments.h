// The arguments of ademamix_step_, read and checked, as every kernel's op begins.
#pragma once

#include "check.h"

namespace ademamix {

struct StepLists {
  Views params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps, remainders;
};

// Lr is double, or Tensor: a learning rate that a compiled or captured step reads anew each time.
template <class Lr>
void check_step(const StepLists& lists, const Lr& lr, const Hyperparameters& h, bool stochastic_param_rounding,
                size_t streams, const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf) {
  const Checker check("ademamix_step_", lists.params);
  check.grads(lists.grads);
  check.state("exp_avgs", lists.exp_avgs);
  check.state("exp_avg_slows", lists.exp_avg_slows);
  check.state("exp_avg_sqs", lists.exp_avg_sqs);
  check.steps(lists.steps);
  check.param_rounding(lists.remainders, stochastic_param_rounding);
  if (stochastic_param_rounding) check.length("streams", streams);
  check.scalars(lr, grad_scale, found_inf);
  check.hyperparameters(h);
}

struct BlockwiseLists {
  Views params, grads, exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs,
      steps, remainders;
};

template <class Lr>
void check_blockwise_step(const BlockwiseLists& lists, const Lr& lr, const Hyperparameters& h,
                          bool stochastic_param_rounding, size_t streams, const std::optional<Tensor>& grad_scale,
                          const std::optional<Tensor>& found_inf) {
  const Checker check("ademamix_blockwise_step_", lists.params);
  check.grads(lists.grads);
  check.codes("exp_avgs", lists.exp_avgs, {ScalarType::Char});
  check.absmaxs("exp_avg_absmaxs", lists.exp_avg_absmaxs);
  check.codes("exp_avg_slows", lists.exp_avg_slows, {ScalarType::Short, ScalarType::Char});
  check.absmaxs("exp_avg_slow_absmaxs", lists.exp_avg_slow_absmaxs);
  check.codes("exp_avg_sqs", lists.exp_avg_sqs, {ScalarType::Byte});
  check.absmaxs("exp_avg_sq_absmaxs", lists.exp_avg_sq_absmaxs);
  check.steps(lists.steps);
  check.param_rounding(lists.remainders, stochastic_param_rounding);
  check.length("streams", streams);
  check.scalars(lr, grad_scale, found_inf);
  check.hyperparameters(h);
}

}  // namespace ademamix

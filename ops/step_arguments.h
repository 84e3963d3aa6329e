// The ops ademamix_step_ and ademamix_blockwise_step_ of any device: their arguments, read and checked.
#pragma once

#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "check.h"

namespace ademamix {

struct StepLists {
  static constexpr const char* OP = "ademamix_step_";

  Views params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps, remainders;  // no exp_avgs: beta1 is 0

  void check(Checker& check) const {
    check.grads(grads);
    if (check.has_exp_avg(exp_avgs)) check.state(exp_avgs);
    check.state(exp_avg_slows);
    check.state(exp_avg_sqs);
    check.steps(steps);
  }

  // Replaces arenas by a view for each parameter.
  void place(const std::vector<Place>& places) {
    for (Views* list : {&exp_avgs, &exp_avg_slows, &exp_avg_sqs, &remainders})
      *list = state_parts(*list, params, places);
    steps = step_parts(steps, params, places);
  }
};

struct BlockwiseLists {
  static constexpr const char* OP = "ademamix_blockwise_step_";

  Views params, grads, exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs,
      steps, remainders;

  // Codes of 12 and 4 bits are words in exp_avg_slows: where one of the other moments has scales, but no codes.
  bool has_exp_avg() const { return !exp_avg_absmaxs.empty(); }
  bool exp_avg_in_words() const { return has_exp_avg() && exp_avgs.empty(); }
  bool exp_avg_sq_in_words() const {
    return !has_exp_avg() && exp_avgs.empty() && exp_avg_sqs.empty() && !exp_avg_slows.empty();
  }
  bool in_words() const { return exp_avg_in_words() || exp_avg_sq_in_words(); }

  void check(Checker& check) const {
    check.grads(grads);
    if (check.has_exp_avg(exp_avgs.empty() ? exp_avg_absmaxs : exp_avgs)) {
      if (!exp_avg_in_words()) check.codes(exp_avgs, {ScalarType::Char});
      check.absmaxs(exp_avg_absmaxs);
    }
    if (in_words())
      check.codes(exp_avg_slows, {ScalarType::Short});
    else
      check.codes(exp_avg_slows, {ScalarType::Short, ScalarType::Char});
    check.absmaxs(exp_avg_slow_absmaxs);
    if (!exp_avg_sq_in_words()) check.codes(exp_avg_sqs, {ScalarType::Byte});
    check.absmaxs(exp_avg_sq_absmaxs);
    check.steps(steps);
  }

  void place(const std::vector<Place>& places) {
    for (Views* list : {&exp_avgs, &exp_avg_slows, &exp_avg_sqs}) *list = code_parts(*list, params, places);
    for (Views* list : {&exp_avg_absmaxs, &exp_avg_slow_absmaxs, &exp_avg_sq_absmaxs})
      *list = absmax_parts(*list, params, places);
    remainders = state_parts(remainders, params, places);
    steps = step_parts(steps, params, places);
  }
};

// What a call has beside its lists.
struct StepOptions {
  std::variant<NumberRows, Tensor> hyperparameters;
  std::vector<int64_t> rows;  // of hyperparameters, each parameter's; empty where all have the first
  bool maximize;
  bool stochastic_rounding;  // of exp_avg_sq
  bool stochastic_param_rounding;
  int64_t seed;
  std::vector<int64_t> streams, places;
  std::optional<Tensor> grad_scale, found_inf;
  bool dry_run;
  ParamRounding param_rounding{};

  size_t row_of(size_t param) const { return rows.empty() ? 0 : static_cast<size_t>(rows[param]); }
};

// Checks a call, and lets `step` do it; in a dry run, what it does ahead of its first write.
template <class Lists, class Step>
void run_op(Lists lists, StepOptions options, const Step& step) {
  Checker check(Lists::OP, lists.params, options.places);
  lists.check(check);
  options.param_rounding = check.param_rounding(lists.remainders, options.stochastic_param_rounding);
  check.places(lists.steps);
  const bool draws = std::is_same_v<Lists, BlockwiseLists> || ademamix::draws(options.param_rounding);
  if (draws) check.length(options.streams.size());
  std::visit([&](const auto& h) { check.hyperparameters(h, options.rows); }, options.hyperparameters);
  check.scaler(options.grad_scale, options.found_inf);
  if (lists.params.empty()) return;
  if (!options.places.empty()) lists.place(places_of(options.places));
  step(lists, options);
}

// The overloads of ademamix_step_, where STEP is a device's void(StepLists&, const StepOptions&).
template <auto STEP>
struct StepOp {
  static void with_numbers(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_slows,
                           TensorList exp_avg_sqs, TensorList steps, TensorList remainders,
                           std::vector<double> hyperparameters, TensorList lrs, std::vector<int64_t> rows,
                           bool maximize, bool stochastic_param_rounding, int64_t seed, std::vector<int64_t> streams,
                           std::vector<int64_t> places, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf, bool dry_run) {
    run_op(lists(params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps, remainders),
           {NumberRows{std::move(hyperparameters), lrs}, std::move(rows), maximize, false, stochastic_param_rounding,
            seed, std::move(streams), std::move(places), grad_scale, found_inf, dry_run},
           STEP);
  }

  static void with_tensor(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_slows,
                          TensorList exp_avg_sqs, TensorList steps, TensorList remainders, Tensor hyperparameters,
                          std::vector<int64_t> rows, bool maximize, bool stochastic_param_rounding, int64_t seed,
                          std::vector<int64_t> streams, std::vector<int64_t> places, std::optional<Tensor> grad_scale,
                          std::optional<Tensor> found_inf, bool dry_run) {
    run_op(lists(params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps, remainders),
           {hyperparameters, std::move(rows), maximize, false, stochastic_param_rounding, seed, std::move(streams),
            std::move(places), grad_scale, found_inf, dry_run},
           STEP);
  }

 private:
  template <class... Lists>
  static StepLists lists(const Lists&... lists) {
    return {views_of(lists)...};
  }
};

template <auto STEP>
void register_step(torch::stable::detail::StableLibrary& m) {
  m.impl("_ademamix_step_", TORCH_BOX(&StepOp<STEP>::with_numbers));
  m.impl("_ademamix_step_.tensor_hyperparameters", TORCH_BOX(&StepOp<STEP>::with_tensor));
}

// The overloads of ademamix_blockwise_step_, where STEP is a device's void(BlockwiseLists&, const StepOptions&).
template <auto STEP>
struct BlockwiseStepOp {
  static void with_numbers(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_absmaxs,
                           TensorList exp_avg_slows, TensorList exp_avg_slow_absmaxs, TensorList exp_avg_sqs,
                           TensorList exp_avg_sq_absmaxs, TensorList steps, TensorList remainders,
                           std::vector<double> hyperparameters, TensorList lrs, std::vector<int64_t> rows,
                           bool maximize, bool stochastic_rounding, bool stochastic_param_rounding, int64_t seed,
                           std::vector<int64_t> streams, std::vector<int64_t> places, std::optional<Tensor> grad_scale,
                           std::optional<Tensor> found_inf, bool dry_run) {
    run_op(lists(params, grads, exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs,
                 exp_avg_sq_absmaxs, steps, remainders),
           {NumberRows{std::move(hyperparameters), lrs}, std::move(rows), maximize, stochastic_rounding,
            stochastic_param_rounding, seed, std::move(streams), std::move(places), grad_scale, found_inf, dry_run},
           STEP);
  }

  static void with_tensor(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_absmaxs,
                          TensorList exp_avg_slows, TensorList exp_avg_slow_absmaxs, TensorList exp_avg_sqs,
                          TensorList exp_avg_sq_absmaxs, TensorList steps, TensorList remainders,
                          Tensor hyperparameters, std::vector<int64_t> rows, bool maximize, bool stochastic_rounding,
                          bool stochastic_param_rounding, int64_t seed, std::vector<int64_t> streams,
                          std::vector<int64_t> places, std::optional<Tensor> grad_scale,
                          std::optional<Tensor> found_inf, bool dry_run) {
    run_op(lists(params, grads, exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs,
                 exp_avg_sq_absmaxs, steps, remainders),
           {hyperparameters, std::move(rows), maximize, stochastic_rounding, stochastic_param_rounding, seed,
            std::move(streams), std::move(places), grad_scale, found_inf, dry_run},
           STEP);
  }

 private:
  template <class... Lists>
  static BlockwiseLists lists(const Lists&... lists) {
    return {views_of(lists)...};
  }
};

template <auto STEP>
void register_blockwise_step(torch::stable::detail::StableLibrary& m) {
  m.impl("_ademamix_blockwise_step_", TORCH_BOX(&BlockwiseStepOp<STEP>::with_numbers));
  m.impl("_ademamix_blockwise_step_.tensor_hyperparameters", TORCH_BOX(&BlockwiseStepOp<STEP>::with_tensor));
}

}  // namespace ademamix

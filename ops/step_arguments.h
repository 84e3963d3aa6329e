// The ops ademamix_step_ and ademamix_blockwise_step_ on any device: their arguments, read and checked.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "check.h"

namespace ademamix {

struct StepLists {
  static constexpr const char* OP = "ademamix_step_";
  static constexpr bool QUANTIZED = false;

  Views params, grads, exp_avgs, exp_avg_slows, exp_avg_sqs, steps, remainders;  // without exp_avgs, beta1 is 0

  // In the order of the op's schema.
  std::array<Views*, 7> all() {
    return {&params, &grads, &exp_avgs, &exp_avg_slows, &exp_avg_sqs, &steps, &remainders};
  }

  void check(Checker& check) const {
    check.grads(grads);
    if (check.has_exp_avg(exp_avgs)) check.state(exp_avgs);
    check.state(exp_avg_slows);
    check.state(exp_avg_sqs);
    check.steps(steps);
  }

  // Replaces arenas by views for each parameter.
  void view_arenas(const std::vector<StateOffsets>& offsets) {
    for (Views* list : {&exp_avgs, &exp_avg_slows, &exp_avg_sqs, &remainders})
      *list = state_views(*list, params, offsets);
    steps = step_views(steps, params, offsets);
  }
};

struct BlockwiseLists {
  static constexpr const char* OP = "ademamix_blockwise_step_";
  static constexpr bool QUANTIZED = true;

  Views params, grads, exp_avgs, exp_avg_absmaxs, exp_avg_slows, exp_avg_slow_absmaxs, exp_avg_sqs, exp_avg_sq_absmaxs,
      steps, remainders;

  // In the order of the op's schema.
  std::array<Views*, 10> all() {
    return {&params,        &grads,
            &exp_avgs,      &exp_avg_absmaxs,
            &exp_avg_slows, &exp_avg_slow_absmaxs,
            &exp_avg_sqs,   &exp_avg_sq_absmaxs,
            &steps,         &remainders};
  }

  // Codes of 12 and 4 bits are in words, in exp_avg_slows: then one of the other moments has scales, but no codes.
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

  void view_arenas(const std::vector<StateOffsets>& offsets) {
    for (Views* list : {&exp_avgs, &exp_avg_slows, &exp_avg_sqs}) *list = code_views(*list, params, offsets);
    for (Views* list : {&exp_avg_absmaxs, &exp_avg_slow_absmaxs, &exp_avg_sq_absmaxs})
      *list = absmax_views(*list, params, offsets);
    remainders = state_views(remainders, params, offsets);
    steps = step_views(steps, params, offsets);
  }
};

// The arguments of a call that aren't lists of tensors.
struct StepOptions {
  std::variant<NumberRows, Tensor> hyperparameters;
  std::vector<int64_t> rows;  // each parameter's row of hyperparameters; empty if all have the first
  bool maximize;
  bool stochastic_rounding;  // of exp_avg_sq
  bool stochastic_param_rounding;
  int64_t seed;
  std::vector<int64_t> subsequences;  // each parameter's, of random bits
  std::vector<int64_t> offsets;       // OFFSETS_PER_PARAM for each parameter, or none
  std::optional<Tensor> grad_scale, found_inf;
  bool dry_run;
  ParamRounding param_rounding{};

  size_t row_of(size_t param) const { return rows.empty() ? 0 : static_cast<size_t>(rows[param]); }
};

// Checks a call, then calls `step`, which does in a dry run what comes before its first write.
template <class Lists, class Step>
void run_op(Lists lists, StepOptions options, const Step& step) {
  Checker check(Lists::OP, lists.params, options.offsets);
  lists.check(check);
  options.param_rounding = check.param_rounding(lists.remainders, options.stochastic_param_rounding);
  check.offsets(lists.steps);
  if (Lists::QUANTIZED || draws(options.param_rounding)) check.length(options.subsequences.size());
  std::visit([&](const auto& h) { check.hyperparameters(h, options.rows); }, options.hyperparameters);
  check.scaler(options.grad_scale, options.found_inf);
  if (lists.params.empty()) return;
  if (!options.offsets.empty()) lists.view_arenas(read_offsets(options.offsets));
  step(lists, options);
}

// Takes over the arguments of a call, one after another, in the order of the op's schema.
class BoxedArguments {
 public:
  explicit BoxedArguments(StableIValue* stack) : next_(stack) {}

  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }

 private:
  StableIValue* next_;
};

// A step op as the dispatcher calls it: STEP is a device's void(Lists&, const StepOptions&), and Hyperparameters the
// type of an overload's argument of that name. (TORCH_BOX would need each op's signature, of some 20 arguments.)
template <class Lists, auto STEP, class Hyperparameters>
void boxed_step(StableIValue* stack, uint64_t count, uint64_t) {
  using Integers = std::vector<int64_t>;
  using Tensors = std::vector<Tensor>;
  using OptionalTensor = std::optional<Tensor>;
  BoxedArguments arguments(stack);
  Lists lists;
  std::array<Tensors, std::tuple_size_v<decltype(lists.all())>> tensors;
  constexpr bool HAS_LRS = !std::is_same_v<Hyperparameters, Tensor>;
  if (count != tensors.size() + (HAS_LRS ? 2 : 1) + (Lists::QUANTIZED ? 10 : 9))
    throw std::runtime_error(std::string(Lists::OP) + ": this library was built for another schema of the op");
  for (Tensors& list : tensors) list = arguments.next<Tensors>();
  auto hyperparameters = arguments.next<Hyperparameters>();
  const Tensors lrs = HAS_LRS ? arguments.next<Tensors>() : Tensors{};
  StepOptions options{{},
                      /*rows=*/arguments.next<Integers>(),
                      /*maximize=*/arguments.next<bool>(),
                      /*stochastic_rounding=*/Lists::QUANTIZED && arguments.next<bool>(),
                      /*stochastic_param_rounding=*/arguments.next<bool>(),
                      /*seed=*/arguments.next<int64_t>(),
                      /*subsequences=*/arguments.next<Integers>(),
                      /*offsets=*/arguments.next<Integers>(),
                      /*grad_scale=*/arguments.next<OptionalTensor>(),
                      /*found_inf=*/arguments.next<OptionalTensor>(),
                      /*dry_run=*/arguments.next<bool>()};
  if constexpr (HAS_LRS)
    options.hyperparameters = NumberRows{std::move(hyperparameters), lrs};
  else
    options.hyperparameters = std::move(hyperparameters);
  for (size_t i = 0; i < tensors.size(); ++i) *lists.all()[i] = views_of(tensors[i]);
  run_op(std::move(lists), std::move(options), STEP);
}

template <class Lists, auto STEP>
void register_step(torch::stable::detail::StableLibrary& m) {
  const std::string name = std::string("_") + Lists::OP;
  m.impl(name.c_str(), &boxed_step<Lists, STEP, std::vector<double>>);
  m.impl((name + ".tensor_hyperparameters").c_str(), &boxed_step<Lists, STEP, Tensor>);
}

}  // namespace ademamix

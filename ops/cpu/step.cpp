// ademamix_step_ on the CPU.
#include "arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace ademamix {
namespace {

template <class T>
void run(const StepLists& lists, const StepOptions& options) {
  const auto scalars = advance<T>(lists.steps, options);
  const ParamRounding rounding = options.param_rounding;
  std::vector<StepTensor<T>> tensors;
  std::vector<int64_t> numels;
  tensors.reserve(lists.params.size());
  numels.reserve(lists.params.size());
  const bool has_exp_avg = !lists.exp_avgs.empty();
  for (size_t i = 0; i < lists.params.size(); ++i) {
    StepTensor<T> t{{lists.params[i], rounding},
                    lists.grads[i],
                    has_exp_avg ? lists.exp_avgs[i] : lists.params[i],
                    lists.exp_avg_slows[i],
                    lists.exp_avg_sqs[i],
                    scalars[i],
                    has_exp_avg};
    t.param.remainder = has_remainder(rounding) ? lists.remainders[i] : t.param.tensor;
    if (draws(rounding)) {
      // Random bits belong to the elements in row-major order.
      t.param.random = random_key(options.seed, lists.steps[i], options.subsequences[i]);
    } else {
      use_common_order({&t.param.tensor, &t.param.remainder, &t.grad, &t.exp_avg, &t.exp_avg_slow, &t.exp_avg_sq});
    }
    tensors.push_back(t);
    numels.push_back(lists.params[i].numel);
  }
  parallel_over_elements(numels, [&](size_t i, int64_t begin, int64_t end) { step_elements(tensors[i], begin, end); });
}

void step(const StepLists& lists, const StepOptions& options) {
  if (skipped(options)) return;
  const auto run_as = lists.params[0].dtype == ScalarType::Double ? run<double> : run<float>;
  run_as(lists, options);
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CPU, m) { ademamix::register_step<ademamix::StepLists, ademamix::step>(m); }

// ademamix_step_ on CUDA devices.
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
    const auto numel = static_cast<size_t>(r.numel), bytes = numel * sizeof(typename StepTypes<P, G>::T);
    return std::array<MemoryRange, 4>{
        {{r.exp_avg, bytes}, {r.exp_avg_slow, bytes}, {r.exp_avg_sq, bytes}, {r.remainder, 2 * numel}}};
  };
  for_each_launch(device, records, step_tiles, state_of, [&](const TensorTable<StepRecord>& table, uint32_t tiles) {
    launch(device.stream(), step_kernel<P, G, ROUNDING>, tiles, STEP_THREADS, table, scalars, random.seed, found_inf);
  });
}

template <class T>
void run(const CurrentDevice& device, const StepLists& lists, const StepOptions& options) {
  const StepNumbers numbers = numbers_of(options);
  const RandomSource random{static_cast<uint64_t>(options.seed), options.streams};
  const Tensor scratch = scratch_memory(lists.params[0], lists.steps.size() * sizeof(TensorScalars<T>));
  auto* scalars = static_cast<TensorScalars<T>*>(scratch.data_ptr());
  launch_prologues(device.stream(), lists.steps, numbers, scalars);
  with_floating(lists.params[0].dtype, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<T, double> == std::is_same_v<P, double>) {
      with_floating(lists.grads[0].dtype, [&](auto g) {
        with_rounding<P>(lists.remainders, options.stochastic_param_rounding, [&](auto rounding) {
          launch_steps<P, decltype(g), rounding()>(device, lists, random, scalars, numbers.found_inf);
        });
      });
    }
  });
}

void step(StepLists& lists, const StepOptions& options) {
  const CurrentDevice device(lists.params[0].device_index);
  CommonOrder order({{lists.params, true},
                     {lists.grads, false},
                     {lists.exp_avgs, true},
                     {lists.exp_avg_slows, true},
                     {lists.exp_avg_sqs, true},
                     {lists.remainders, true}},
                    /*any_order=*/!options.stochastic_param_rounding);
  const auto run_as = lists.params[0].dtype == ScalarType::Double ? run<double> : run<float>;
  run_as(device, lists, options);
  order.write_back();
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) { ademamix::register_step<ademamix::step>(m); }

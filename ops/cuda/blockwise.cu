// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on CUDA devices.
#include <tuple>

#include "../step_arguments.h"
#include "arguments.h"
#include "blockwise_kernel.cuh"
#include "paging.h"
#include "runtime.h"

namespace ademamix {
namespace {

template <class S>
bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % Lanes<S, LANE_ELEMENTS>::ALIGNMENT == 0;
}

template <class P, class G, class Slow, ParamRounding ROUNDING>
std::vector<BlockwiseRecord> make_records(const BlockwiseLists& lists, const std::vector<int64_t>& streams) {
  std::vector<BlockwiseRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    BlockwiseRecord r{lists.params[i].data,
                      lists.grads[i].data,
                      static_cast<int8_t*>(lists.exp_avgs[i].data),
                      lists.exp_avg_slows[i].data,
                      static_cast<uint8_t*>(lists.exp_avg_sqs[i].data),
                      static_cast<float*>(lists.exp_avg_absmaxs[i].data),
                      static_cast<float*>(lists.exp_avg_slow_absmaxs[i].data),
                      static_cast<float*>(lists.exp_avg_sq_absmaxs[i].data)};
    if constexpr (ROUNDING == ParamRounding::REMAINDER) r.remainder = static_cast<int16_t*>(lists.remainders[i].data);
    r.numel = lists.params[i].numel;
    const bool wide = aligned<P>(r.param) && aligned<G>(r.grad) && aligned<int8_t>(r.exp_avg) &&
                      aligned<typename Slow::Code>(r.exp_avg_slow) && aligned<uint8_t>(r.exp_avg_sq) &&
                      aligned<int16_t>(r.remainder);
    r.blocks = static_cast<uint32_t>(block_count(r.numel));
    r.wide_blocks = wide ? static_cast<uint32_t>(r.numel / BLOCK_SIZE) : 0;
    r.stream = streams[i];
    records.push_back(r);
  }
  return records;
}

uint32_t tiles_of(const BlockwiseRecord& r) { return (r.blocks + TILE_BLOCKS - 1) / TILE_BLOCKS; }

template <class P, class G, class Slow, bool STOCHASTIC, ParamRounding ROUNDING>
void launch_steps(const CurrentDevice& device, const std::vector<BlockwiseRecord>& records,
                  const TensorScalars<typename BlockwiseTypes<P>::T>* scalars, uint64_t seed, const float* found_inf) {
  const auto ctas = static_cast<uint32_t>(multiprocessors(device.index()) * BLOCKWISE_CTAS_PER_SM<P, ROUNDING>);
  const auto state_of = [](const BlockwiseRecord& r) {
    return std::array<const void*, 4>{r.exp_avg, r.exp_avg_slow, r.exp_avg_sq, r.remainder};
  };
  for_each_launch(device, records, tiles_of, state_of, [&](const TensorTable<BlockwiseRecord>& table, uint32_t tiles) {
    launch(device.stream(), blockwise_step_kernel<P, G, Slow, STOCHASTIC, ROUNDING>, std::min(tiles, ctas),
           BLOCKWISE_THREADS, table, scalars, seed, found_inf);
  });
}

template <class T>
void run_blockwise_step(const CurrentDevice& device, const BlockwiseLists& lists, const Tensor& param,
                        const Hyperparameters& h, Scalar lr, Scalar grad_scale, const float* found_inf,
                        bool stochastic_rounding, bool stochastic_param_rounding, const RandomSource& random) {
  const Tensor scratch = scratch_memory(param, lists.steps.size() * sizeof(TensorScalars<T>));
  auto* scalars = static_cast<TensorScalars<T>*>(scratch.data_ptr());
  launch_prologues(device.stream(), lists.steps, h, lr, grad_scale, found_inf, scalars);
  with_floating(lists.params[0].dtype, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<T, double> == std::is_same_v<P, double>) {
      with_floating(lists.grads[0].dtype, [&](auto g) {
        using G = decltype(g);
        with_rounding<P>(lists.remainders, stochastic_param_rounding, [&](auto rounding) {
          const auto with_slow_format = [&](auto format) {
            using Slow = decltype(format);
            const auto records = make_records<P, G, Slow, rounding()>(lists, random.streams);
            if (stochastic_rounding)
              launch_steps<P, G, Slow, true, rounding()>(device, records, scalars, random.seed, found_inf);
            else
              launch_steps<P, G, Slow, false, rounding()>(device, records, scalars, random.seed, found_inf);
          };
          if (lists.exp_avg_slows[0].dtype == ScalarType::Short)
            with_slow_format(Linear{});
          else
            with_slow_format(SignedSqrt{});
        });
      });
    }
  });
}

template <class Lr>
void blockwise_step(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_absmaxs,
                    TensorList exp_avg_slows, TensorList exp_avg_slow_absmaxs, TensorList exp_avg_sqs,
                    TensorList exp_avg_sq_absmaxs, TensorList steps, Lr lr, double beta1, double beta2, double beta3,
                    double alpha, std::optional<double> t_alpha, std::optional<double> t_beta3, int64_t schedule_start,
                    double eps, double weight_decay, bool maximize, bool stochastic_rounding, TensorList remainders,
                    bool stochastic_param_rounding, int64_t seed, std::vector<int64_t> streams,
                    std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf) {
  const Hyperparameters h{beta1, beta2, beta3, alpha, t_alpha, t_beta3, schedule_start, eps, weight_decay, maximize};
  BlockwiseLists lists{views_of(params),        views_of(grads),
                       views_of(exp_avgs),      views_of(exp_avg_absmaxs),
                       views_of(exp_avg_slows), views_of(exp_avg_slow_absmaxs),
                       views_of(exp_avg_sqs),   views_of(exp_avg_sq_absmaxs),
                       views_of(steps),         views_of(remainders)};
  check_blockwise_step(lists, lr, h, stochastic_param_rounding, streams.size(), grad_scale, found_inf);
  if (params.empty()) return;

  const CurrentDevice device(lists.params[0].device_index);
  CommonOrder order({{params, lists.params, true}, {grads, lists.grads, false}, {remainders, lists.remainders, true}},
                    /*any_order=*/false);
  const auto run = lists.params[0].dtype == ScalarType::Double ? run_blockwise_step<double> : run_blockwise_step<float>;
  run(device, lists, params[0], h, scalar_of(lr), grad_scale ? scalar_of(*grad_scale) : scalar_of(1.0),
      pointer_of(found_inf), stochastic_rounding, stochastic_param_rounding, {static_cast<uint64_t>(seed), streams});
  order.write_back();
}

template <class Format, bool STOCHASTIC = false>
void launch_quantize(const CurrentDevice& device, const Tensor& values, const Tensor& codes, const Tensor& absmax,
                     const RandomKey& key) {
  const auto tiles = static_cast<uint32_t>((absmax.numel() + TILE_BLOCKS - 1) / TILE_BLOCKS);
  launch(device.stream(), quantize_kernel<Format, STOCHASTIC>, tiles, BLOCKWISE_THREADS,
         static_cast<const float*>(values.const_data_ptr()), static_cast<typename Format::Code*>(codes.data_ptr()),
         static_cast<float*>(absmax.data_ptr()), values.numel(), key);
}

std::tuple<Tensor, Tensor> quantize_blockwise(Tensor x, int64_t format, std::optional<int64_t> seed, int64_t step,
                                              int64_t stream) {
  const BlockFormat block_format = check_quantize(view_of(x), format, seed.has_value());
  const CurrentDevice device(x.get_device_index());
  const Tensor values = torch::stable::contiguous(x);
  Tensor codes = torch::stable::new_empty(values, values.sizes(), code_dtype(block_format));
  Tensor absmax = torch::stable::new_empty(values, {block_count(values.numel())}, ScalarType::Float);
  const RandomKey key = random_key(static_cast<uint64_t>(seed.value_or(0)), static_cast<uint32_t>(step), stream);
  if (values.numel() == 0) return {codes, absmax};
  with_format(block_format, [&](auto format) {
    using Format = decltype(format);
    if constexpr (std::is_same_v<Format, FourthRoot>)
      if (seed) return launch_quantize<Format, true>(device, values, codes, absmax, key);
    launch_quantize<Format>(device, values, codes, absmax, key);
  });
  return {codes, absmax};
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t format) {
  const BlockFormat block_format = check_dequantize(view_of(codes), view_of(absmax), format);
  const CurrentDevice device(codes.get_device_index());
  const Tensor source_codes = torch::stable::contiguous(codes), source_absmax = torch::stable::contiguous(absmax);
  Tensor values = torch::stable::new_empty(source_codes, source_codes.sizes(), ScalarType::Float);
  if (values.numel() == 0) return values;
  const auto tiles = static_cast<uint32_t>((source_absmax.numel() + TILE_BLOCKS - 1) / TILE_BLOCKS);
  with_format(block_format, [&](auto format) {
    using Format = decltype(format);
    launch(device.stream(), dequantize_kernel<Format>, tiles, BLOCKWISE_THREADS,
           static_cast<const typename Format::Code*>(source_codes.const_data_ptr()),
           static_cast<const float*>(source_absmax.const_data_ptr()), static_cast<float*>(values.data_ptr()),
           values.numel());
  });
  return values;
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  m.impl("ademamix_blockwise_step_", TORCH_BOX(&ademamix::blockwise_step<double>));
  m.impl("ademamix_blockwise_step_.tensor_lr", TORCH_BOX(&ademamix::blockwise_step<torch::stable::Tensor>));
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

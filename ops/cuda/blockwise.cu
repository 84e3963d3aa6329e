// ademamix_blockwise_step_, quantize_blockwise and dequantize_blockwise on CUDA devices.
#include <tuple>

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

template <class P, class G, class M2, ParamRounding ROUNDING>
std::vector<BlockwiseRecord> make_records(const BlockwiseLists& lists, const std::vector<int64_t>& streams) {
  std::vector<BlockwiseRecord> records;
  records.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    BlockwiseRecord r{lists.params[i].data,
                      lists.grads[i].data,
                      static_cast<uint8_t*>(lists.exp_avgs[i].data),
                      lists.exp_avg_slows[i].data,
                      static_cast<uint8_t*>(lists.exp_avg_sqs[i].data),
                      static_cast<float*>(lists.exp_avg_absmaxs[i].data),
                      static_cast<float*>(lists.exp_avg_slow_absmaxs[i].data),
                      static_cast<float*>(lists.exp_avg_sq_absmaxs[i].data)};
    if constexpr (ROUNDING == ParamRounding::REMAINDER) r.remainder = static_cast<int16_t*>(lists.remainders[i].data);
    r.numel = lists.params[i].numel;
    const bool wide = aligned<P>(r.param) && aligned<G>(r.grad) && aligned<uint8_t>(r.exp_avg) &&
                      aligned<M2>(r.exp_avg_slow) && aligned<uint8_t>(r.exp_avg_sq) && aligned<int16_t>(r.remainder);
    r.blocks = static_cast<uint32_t>(block_count(r.numel));
    r.wide_blocks = wide ? static_cast<uint32_t>(r.numel / BLOCK_SIZE) : 0;
    r.stream = streams[i];
    records.push_back(r);
  }
  return records;
}

uint32_t tiles_of(const BlockwiseRecord& r) { return (r.blocks + TILE_BLOCKS - 1) / TILE_BLOCKS; }

template <class P, class G, class M2, bool STOCHASTIC, ParamRounding ROUNDING>
void launch_steps(const CurrentDevice& device, const std::vector<BlockwiseRecord>& records,
                  const TensorScalars<typename BlockwiseTypes<P>::T>* scalars, uint64_t seed, const float* found_inf) {
  const auto ctas = static_cast<uint32_t>(multiprocessors(device.index()) * BLOCKWISE_CTAS_PER_SM<P, ROUNDING>);
  const auto state_of = [](const BlockwiseRecord& r) {
    const auto numel = static_cast<size_t>(r.numel);
    return std::array<MemoryRange, 4>{
        {{r.exp_avg, numel}, {r.exp_avg_slow, numel * sizeof(M2)}, {r.exp_avg_sq, numel}, {r.remainder, 2 * numel}}};
  };
  for_each_launch(device, records, tiles_of, state_of, [&](const TensorTable<BlockwiseRecord>& table, uint32_t tiles) {
    launch(device.stream(), blockwise_step_kernel<P, G, M2, STOCHASTIC, ROUNDING>, std::min(tiles, ctas),
           BLOCKWISE_THREADS, table, scalars, seed, found_inf);
  });
}

template <class T>
void run_blockwise(const CurrentDevice& device, const BlockwiseLists& lists, const StepOptions& options) {
  const StepNumbers numbers = numbers_of(options);
  const auto seed = static_cast<uint64_t>(options.seed);
  const Tensor scratch = scratch_memory(lists.params[0], lists.steps.size() * sizeof(TensorScalars<T>));
  auto* scalars = static_cast<TensorScalars<T>*>(scratch.data_ptr());
  launch_prologues(device.stream(), lists.steps, numbers, scalars);
  with_floating(lists.params[0].dtype, [&](auto p) {
    using P = decltype(p);
    if constexpr (std::is_same_v<T, double> == std::is_same_v<P, double>) {
      with_floating(lists.grads[0].dtype, [&](auto g) {
        using G = decltype(g);
        with_rounding<P>(lists.remainders, options.stochastic_param_rounding, [&](auto rounding) {
          const auto with_slow_codes = [&](auto code) {
            using M2 = decltype(code);
            const auto records = make_records<P, G, M2, rounding()>(lists, options.streams);
            if (options.stochastic_rounding)
              launch_steps<P, G, M2, true, rounding()>(device, records, scalars, seed, numbers.found_inf);
            else
              launch_steps<P, G, M2, false, rounding()>(device, records, scalars, seed, numbers.found_inf);
          };
          if (lists.exp_avg_slows[0].dtype == ScalarType::Short)
            with_slow_codes(int16_t{});
          else
            with_slow_codes(uint8_t{});
        });
      });
    }
  });
}

void blockwise_step(BlockwiseLists& lists, const StepOptions& options) {
  const CurrentDevice device(lists.params[0].device_index);
  CommonOrder order({{lists.params, true}, {lists.grads, false}, {lists.remainders, true}}, /*any_order=*/false);
  const auto run = lists.params[0].dtype == ScalarType::Double ? run_blockwise<double> : run_blockwise<float>;
  run(device, lists, options);
  order.write_back();
}

template <BlockFormat FORMAT, bool STOCHASTIC = false>
void launch_quantize(const CurrentDevice& device, const Tensor& values, const Tensor& codes, const Tensor& absmax,
                     const RandomKey& key) {
  const auto tiles = static_cast<uint32_t>((absmax.numel() + TILE_BLOCKS - 1) / TILE_BLOCKS);
  launch(device.stream(), quantize_kernel<FORMAT, STOCHASTIC>, tiles, BLOCKWISE_THREADS,
         static_cast<const float*>(values.const_data_ptr()), static_cast<CodeOf<FORMAT>*>(codes.data_ptr()),
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
  switch (block_format) {
    case BlockFormat::SIGNED_DYNAMIC:
      launch_quantize<BlockFormat::SIGNED_DYNAMIC>(device, values, codes, absmax, key);
      break;
    case BlockFormat::UNSIGNED_DYNAMIC:
      if (seed)
        launch_quantize<BlockFormat::UNSIGNED_DYNAMIC, true>(device, values, codes, absmax, key);
      else
        launch_quantize<BlockFormat::UNSIGNED_DYNAMIC>(device, values, codes, absmax, key);
      break;
    case BlockFormat::LINEAR_INT16:
      launch_quantize<BlockFormat::LINEAR_INT16>(device, values, codes, absmax, key);
      break;
  }
  return {codes, absmax};
}

template <BlockFormat FORMAT>
void launch_dequantize(const CurrentDevice& device, const Tensor& codes, const Tensor& absmax, const Tensor& values) {
  const auto tiles = static_cast<uint32_t>((absmax.numel() + TILE_BLOCKS - 1) / TILE_BLOCKS);
  launch(device.stream(), dequantize_kernel<FORMAT>, tiles, BLOCKWISE_THREADS,
         static_cast<const CodeOf<FORMAT>*>(codes.const_data_ptr()), static_cast<const float*>(absmax.const_data_ptr()),
         static_cast<float*>(values.data_ptr()), values.numel());
}

Tensor dequantize_blockwise(Tensor codes, Tensor absmax, int64_t format) {
  const BlockFormat block_format = check_dequantize(view_of(codes), view_of(absmax), format);
  const CurrentDevice device(codes.get_device_index());
  const Tensor source_codes = torch::stable::contiguous(codes), source_absmax = torch::stable::contiguous(absmax);
  Tensor values = torch::stable::new_empty(source_codes, source_codes.sizes(), ScalarType::Float);
  if (values.numel() == 0) return values;
  switch (block_format) {
    case BlockFormat::SIGNED_DYNAMIC:
      launch_dequantize<BlockFormat::SIGNED_DYNAMIC>(device, source_codes, source_absmax, values);
      break;
    case BlockFormat::UNSIGNED_DYNAMIC:
      launch_dequantize<BlockFormat::UNSIGNED_DYNAMIC>(device, source_codes, source_absmax, values);
      break;
    case BlockFormat::LINEAR_INT16:
      launch_dequantize<BlockFormat::LINEAR_INT16>(device, source_codes, source_absmax, values);
      break;
  }
  return values;
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  ademamix::register_blockwise_step<ademamix::blockwise_step>(m);
  m.impl("quantize_blockwise", TORCH_BOX(&ademamix::quantize_blockwise));
  m.impl("dequantize_blockwise", TORCH_BOX(&ademamix::dequantize_blockwise));
}

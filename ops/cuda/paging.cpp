// paged_empty and page_out on CUDA devices, and functions for Python about managed memory.
#include <stdexcept>

#include "../tensor_view.h"
#include "managed_memory.h"

namespace ademamix {
namespace {

// Returns `numel` elements on the device of a tensor: in managed memory if the device has that, else in ordinary
// memory.
Tensor paged_empty(Tensor like, int64_t numel, ScalarType dtype) {
  Gpu& gpu = Gpu::at(view_of(like).device_index);
  if (!gpu.has_managed_memory || numel == 0) return torch::stable::new_empty(like, {numel}, dtype);
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const size_t bytes = static_cast<size_t>(numel) * aoti_torch_dtype_element_size(number);
  return torch::stable::from_blob(ManagedMemory::instance().allocate(bytes, gpu), {numel}, {1}, like.device(), dtype,
                                  [](void* data) { ManagedMemory::instance().release(data); });
}

// Moves the whole allocation of a tensor to the host.
void page_out(Tensor tensor) {
  const TensorView view = view_of(tensor);
  const auto block = ManagedMemory::instance().block_with(view.data);
  if (block.begin == 0) throw std::runtime_error("page_out: tensor isn't in managed memory");
  const CurrentDevice device(view.device_index);
  ManagedMemory::instance().page_out(block, device.stream());
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  m.impl("paged_empty", TORCH_BOX(&ademamix::paged_empty));
  m.impl("page_out", TORCH_BOX(&ademamix::page_out));
}

// Returns the numbers of tensors, bytes and prefetched bytes.
extern "C" __attribute__((visibility("default"))) void ademamix_managed_memory(int64_t (&values)[3]) {
  const auto statistics = ademamix::ManagedMemory::instance().statistics();
  values[0] = statistics.tensors;
  values[1] = statistics.bytes;
  values[2] = statistics.prefetched_bytes;
}

// Whether a GPU, by torch's index, has managed memory; -1 if that is unknown.
extern "C" __attribute__((visibility("default"))) int ademamix_has_managed_memory(int32_t device_index) {
  try {
    return ademamix::Gpu::at(device_index).has_managed_memory;
  } catch (const std::exception&) {
    return -1;
  }
}

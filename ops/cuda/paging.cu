// paged_empty_like on CUDA devices, and what Python asks about managed memory.
#include "paging.h"

#include "../check.h"

namespace ademamix {
namespace {

// In managed memory, in the order of `like` if that has no gaps, else row-major.
Tensor paged_empty_like(Tensor like, ScalarType dtype) {
  const TensorView view = view_of(like);
  const CurrentDevice device(view.device_index);
  std::vector<int64_t> strides(view.strides, view.strides + view.dims);
  if (!fills_memory(view))
    for (int64_t d = view.dims - 1, stride = 1; d >= 0; stride *= view.sizes[d--]) strides[d] = stride;
  const auto number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const size_t bytes = std::max<size_t>(1, static_cast<size_t>(view.numel)) * aoti_torch_dtype_element_size(number);
  return torch::stable::from_blob(ManagedMemory::instance().allocate(bytes, view.device_index), like.sizes(), strides,
                                  like.device(), dtype, [](void* data) { ManagedMemory::instance().release(data); });
}

// The whole allocation that a tensor begins.
void page_out(Tensor tensor) {
  const TensorView view = view_of(tensor);
  if (ManagedMemory::instance().size_at(view.data) == 0) refuse("page_out: tensor doesn't begin managed memory");
  const CurrentDevice device(view.device_index);
  ManagedMemory::instance().page_out(view.data, device.stream());
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CUDA, m) {
  m.impl("paged_empty_like", TORCH_BOX(&ademamix::paged_empty_like));
  m.impl("page_out", TORCH_BOX(&ademamix::page_out));
}

// For the Python module, which finds it by its name: tensors, bytes and prefetched bytes.
extern "C" __attribute__((visibility("default"))) void ademamix_managed_memory(int64_t (&values)[3]) {
  const auto statistics = ademamix::ManagedMemory::instance().statistics();
  values[0] = statistics.tensors;
  values[1] = statistics.bytes;
  values[2] = statistics.prefetched_bytes;
}

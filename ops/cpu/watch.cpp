// Checks whether tensors are still at the addresses that they had when a step was planned. Each step does this for all
// tensors of state; in Python, it would take longer than the rest of a step of many small parameters.
#include <utility>
#include <vector>

#include "../torch_stable.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace ademamix {
namespace {

using Watched = std::vector<std::pair<Tensor, void*>>;  // with their addresses at first

void* address_of(const Tensor& t) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &data));
  return data;
}

int64_t watch(TensorList tensors) {
  auto* watched = new Watched;
  for (const Tensor& t : tensors) watched->emplace_back(t, address_of(t));
  return reinterpret_cast<int64_t>(watched);
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CompositeExplicitAutograd, m) {
  m.impl("_watch", TORCH_BOX(&ademamix::watch));
}

// Returns 1 if no tensor has moved.
EXPORTED int ademamix_unmoved(int64_t handle) {
  for (const auto& [t, address] : *reinterpret_cast<const ademamix::Watched*>(handle))
    if (ademamix::address_of(t) != address) return 0;
  return 1;
}

EXPORTED void ademamix_unwatch(int64_t handle) { delete reinterpret_cast<ademamix::Watched*>(handle); }

// Whether tensors still are what they were when a step was planned. Asked at every step, of all tensors of state: in
// Python, that takes longer than the rest of a step of many small parameters.
#include <algorithm>
#include <utility>
#include <vector>

#include "../torch_stable.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace ademamix {
namespace {

void* data_of(const Tensor& t) {
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &data));
  return data;
}

struct Form {
  int32_t dtype;
  std::vector<int64_t> strides;

  explicit Form(const Tensor& t) {
    int64_t dims, *values;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &values));
    strides.assign(values, values + dims);
  }

  bool is_of(const Tensor& t) const {
    int32_t own;
    int64_t dims, *values;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &own));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &values));
    return own == dtype && std::equal(strides.begin(), strides.end(), values, values + dims);
  }
};

struct Watched {
  std::vector<std::pair<Tensor, void*>> located;
  std::vector<std::pair<Tensor, Form>> formed;
};

int64_t watch(TensorList located, TensorList formed) {
  auto* watched = new Watched;
  for (const Tensor& t : located) watched->located.emplace_back(t, data_of(t));
  for (const Tensor& t : formed) watched->formed.emplace_back(t, Form(t));
  return reinterpret_cast<int64_t>(watched);
}

}  // namespace
}  // namespace ademamix

STABLE_TORCH_LIBRARY_IMPL(torch_ademamix, CompositeExplicitAutograd, m) {
  m.impl("_watch", TORCH_BOX(&ademamix::watch));
}

// 1 if each tensor lies where it did, or has the dtype and strides that it had.
EXPORTED int ademamix_unchanged(int64_t handle) {
  const auto& watched = *reinterpret_cast<const ademamix::Watched*>(handle);
  for (const auto& [t, data] : watched.located)
    if (ademamix::data_of(t) != data) return 0;
  for (const auto& [t, form] : watched.formed)
    if (!form.is_of(t)) return 0;
  return 1;
}

EXPORTED void ademamix_unwatch(int64_t handle) { delete reinterpret_cast<ademamix::Watched*>(handle); }

// The CUDA ops as ops of the CPU, in a namespace of their own: the sources of ops/cuda, on this folder's
// cuda_runtime.h.
#include <cuda_runtime.h>

#include "../../ops/torch_stable.h"

#define ADEMAMIX_PREFETCH_BYTES 1000

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(cuda_on_host, CPU, m, C10_UID)

#include "../../ops/cuda/blockwise.cu"
#include "../../ops/cuda/paging.cu"
#include "../../ops/cuda/step.cu"

extern "C" {

// Of torch's functions those that need a GPU.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

// What the runtime was called for since the last call.
EXPORT const char* take_log() {
  static std::string last;
  last = std::exchange(cuda_on_host::log, "");
  return last.c_str();
}

EXPORT void set_capturing(bool capturing) { cuda_on_host::capturing = capturing; }

EXPORT int steps_of_a_launch() { return ademamix::StepPointers::CAPACITY; }
EXPORT int tensors_of_a_launch() { return ademamix::TensorTable<ademamix::StepRecord>::CAPACITY; }
EXPORT int blockwise_tensors_of_a_launch() { return ademamix::TensorTable<ademamix::BlockwiseRecord>::CAPACITY; }

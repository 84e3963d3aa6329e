// Of CUDA's runtime, what the ops need: errors as exceptions, torch's current stream, launches.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../torch_stable.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace ademamix {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call, somebody else's, would report it again
  throw std::runtime_error(std::string("torch_ademamix: ") + what + ": CUDA error: " + cudaGetErrorString(error));
}

// The device of a call's tensors made current, and torch's current stream of it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device_index) : guard_(device_index), index_(device_index) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  int32_t index() const { return index_; }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
  cudaStream_t stream_;
};

inline int multiprocessors(int32_t device_index) {
  int count;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index), "cudaDeviceGetAttribute");
  return count;
}

template <class... Parameters, class... Arguments>
void launch(cudaStream_t stream, void (*kernel)(Parameters...), unsigned int blocks, unsigned int threads,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "kernel launch");
}

}  // namespace ademamix

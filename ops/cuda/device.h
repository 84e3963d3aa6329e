// The ops' view of a GPU: its kernels, torch's current stream, launches.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "compiler.h"
#include "driver.h"

namespace ademamix {

struct Kernel {
  CUfunction function;
  int ctas_per_multiprocessor;  // that fit at once
};

// One object for each of the process' GPUs, which is never destroyed.
class Gpu {
 public:
  static Gpu& at(int32_t index);  // torch's index

  // Treats every device as a GPU of that compute capability that is absent: kernels are compiled, but not loaded. 0
  // ends this.
  static void only_compile_for(int compute_capability);

  int32_t index;
  CUdevice device;
  CUcontext context;  // that torch and the CUDA runtime use; nullptr for an absent GPU
  int multiprocessors;
  int compute_capability;  // 90, for example
  bool has_managed_memory;
  bool can_prefetch;  // managed memory; not under Windows, for example

  // Compiles and loads the kernel if necessary; throws if that would be while the stream is captured.
  Kernel kernel(const std::string& name, int threads, CUstream stream);

 private:
  Gpu() = default;
  explicit Gpu(int32_t index);

  int attribute(int number) const;
  Kernel load(const DeviceCode& code, int threads) const;

  std::mutex mutex_;
  std::map<std::string, Kernel> kernels_;  // by their names
};

// Makes a GPU's context the thread's current one. A thread that hasn't used CUDA yet has none.
class CurrentContext {
 public:
  explicit CurrentContext(const Gpu& gpu) : pushed_(gpu.context != nullptr) {
    if (pushed_) check_cuda(driver().cuCtxPushCurrent_v2(gpu.context), "context");
  }
  ~CurrentContext() {
    CUcontext popped;
    if (pushed_) driver().cuCtxPopCurrent_v2(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  bool pushed_;
};

CUstream torch_stream(int32_t device_index);

// Makes the device of a call's tensors current; has torch's current stream on it.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device_index)
      : gpu_(Gpu::at(device_index)), stream_(gpu_.context ? torch_stream(device_index) : nullptr), context_(gpu_) {}

  Gpu& gpu() const { return gpu_; }
  CUstream stream() const { return stream_; }

 private:
  Gpu& gpu_;
  CUstream stream_;
  CurrentContext context_;
};

bool is_capturing(CUstream stream);

// While another thread captures a graph, memory may be allocated and freed, and code loaded.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  int mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// The arguments are of the types that the kernel has.
template <class... Arguments>
void launch(const Kernel& kernel, CUstream stream, unsigned int blocks, unsigned int threads,
            const Arguments&... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check_cuda(driver().cuLaunchKernel(kernel.function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, nullptr),
             "kernel launch");
}

}  // namespace ademamix

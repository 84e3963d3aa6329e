// A GPU as the ops use it: its kernels, torch's stream on it, launches.
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
  int ctas_per_multiprocessor;  // that it has room for at once
};

// One for each of the process' GPUs, for good.
class Gpu {
 public:
  static Gpu& at(int32_t index);  // torch's

  // From now on any device is taken for a GPU of that compute capability that isn't there: kernels are compiled, not
  // loaded. 0 ends it.
  static void only_compile_for(int compute_capability);

  int32_t index;
  CUdevice device;
  CUcontext context;  // the one that torch, and CUDA's runtime, use; of a GPU that isn't there, nullptr
  int multiprocessors;
  int compute_capability;  // 90, say
  bool has_managed_memory;
  bool can_prefetch;  // managed memory; not under Windows, for example

  // Compiles and loads it where that hasn't been done; while the stream is captured, refuses to.
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

// The device of a call's tensors made current, and torch's current stream of it.
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

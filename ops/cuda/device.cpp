#include "device.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "../torch_stable.h"

namespace ademamix {

namespace {
std::atomic<int> only_compiled_for{0};
}

void Gpu::only_compile_for(int compute_capability) { only_compiled_for = compute_capability; }

Gpu& Gpu::at(int32_t index) {
  if (const int capability = only_compiled_for) {
    static Gpu absent;
    absent.compute_capability = capability;
    return absent;
  }
  static std::mutex mutex;
  static auto& all = *new std::map<int32_t, std::unique_ptr<Gpu>>;  // tensors may outlive every static object
  const std::lock_guard<std::mutex> lock(mutex);
  auto& gpu = all[index];
  if (!gpu) gpu.reset(new Gpu(index));
  return *gpu;
}

Gpu::Gpu(int32_t torch_index) : index(torch_index) {
  check_cuda(driver().cuDeviceGet(&device, index), "device");
  check_cuda(driver().cuDevicePrimaryCtxRetain(&context, device), "context");
  multiprocessors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  compute_capability = 10 * attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
                       attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  has_managed_memory = attribute(CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY);
  can_prefetch = attribute(CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS);
}

int Gpu::attribute(int number) const {
  int value;
  check_cuda(driver().cuDeviceGetAttribute(&value, number, device), "device attribute");
  return value;
}

Kernel Gpu::kernel(const std::string& name, int threads, CUstream stream) {
  if (!context) return compile(name, compute_capability), Kernel{};
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = kernels_.find(name); found != kernels_.end()) return found->second;
  if (is_capturing(stream))
    throw std::runtime_error("torch_ademamix: " + name +
                             " isn't loaded, which a graph's capture doesn't allow: call optimizer.init_state(), or "
                             "take a step, before the capture");
  const CompiledKernel compiled = compile(name, compute_capability);
  const RelaxedCapture relaxed;
  Kernel kernel;
  try {
    kernel = load(compiled.code, threads);
  } catch (const std::exception&) {
    if (!compiled.from_disk) throw;
    kernel = load(compile_again(name, compute_capability).code, threads);
  }
  kernels_[name] = kernel;
  return kernel;
}

Kernel Gpu::load(const DeviceCode& code, int threads) const {
  CUmodule module;
  Kernel kernel;
  check_cuda(driver().cuModuleLoadData(&module, code.image.data()), "loading a kernel");
  check_cuda(driver().cuModuleGetFunction(&kernel.function, module, code.entry.c_str()), "finding a kernel");
  // This also loads a kernel that the driver would otherwise load at its first launch.
  check_cuda(driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(&kernel.ctas_per_multiprocessor, kernel.function,
                                                                  threads, 0),
             "occupancy");
  return kernel;
}

// A function of libtorch_cuda, which a torch without CUDA doesn't have.
CUstream torch_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  if (!function) throw std::runtime_error("torch_ademamix: this torch has no CUDA");
  void* stream;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return static_cast<CUstream>(stream);
}

bool is_capturing(CUstream stream) {
  int status;
  check_cuda(driver().cuStreamIsCapturing(stream, &status), "capture status");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

}  // namespace ademamix

extern "C" __attribute__((visibility("default"))) void ademamix_only_compile_for(int compute_capability) {
  ademamix::Gpu::only_compile_for(compute_capability);
}

// Device code for the GPU at hand, compiled by NVRTC when it is first needed and kept on disk.
#pragma once

#include <string>

namespace ademamix {

// One variant of a kernel.
struct KernelName {
  const char* header;      // in this folder
  std::string expression;  // "step_kernel<float, half, true, ParamRounding::NEAREST, SHORT_LIST>"
};

struct DeviceCode {
  std::string entry;  // the kernel's name in it
  std::string image;  // what cuModuleLoadData takes
};

// For a GPU of a compute capability, 90, say. Throws the compiler's log. Safe with many threads and processes.
DeviceCode compile(const KernelName& kernel, int compute_capability);

}  // namespace ademamix

// Before the first compilation: the folder of these sources (ops/), the folder of compiled code, which need not exist,
// and NVRTC's file or name.
extern "C" void ademamix_set_up(const char* sources, const char* cache, const char* nvrtc);

// Compiles a kernel into the cache; nullptr, or what went wrong.
extern "C" const char* ademamix_compile(const char* header, const char* expression, int compute_capability);

// Device code for the GPUs of this machine, compiled by NVRTC when it is first needed and kept on disk.
#pragma once

#include <string>

#include "nvrtc.h"

namespace ademamix {

struct CompiledKernel {
  DeviceCode code;
  bool from_disk;
};

// Returns the code of a kernel, "step_kernel<float, half, true, ParamRounding::NEAREST, SHORT_LIST>" for example, for a
// GPU of a compute capability, such as 90. Throws an error with the compiler's log. Safe with several threads and
// processes.
CompiledKernel compile(const std::string& kernel, int compute_capability);

// Compiles the kernel even if it is on disk, and stores it there.
CompiledKernel compile_again(const std::string& kernel, int compute_capability);

}  // namespace ademamix

// To be called before the first compilation, with the folder for compiled code, which need not exist; a folder that is
// only read, or ""; and NVRTC's file or name.
extern "C" void ademamix_set_up(const char* cache, const char* precompiled, const char* nvrtc);

// Changes the folder for code that is compiled from now on; no other folder is read.
extern "C" void ademamix_set_cache(const char* cache);

// Compiles a kernel into the cache. Returns nullptr, or an error text.
extern "C" const char* ademamix_compile(const char* kernel, int compute_capability);

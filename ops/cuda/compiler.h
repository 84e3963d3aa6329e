// Device code for the GPU at hand, compiled by NVRTC when it is first needed and kept on disk.
#pragma once

#include <string>

#include "nvrtc.h"

namespace ademamix {

struct CompiledKernel {
  DeviceCode code;
  bool from_disk;
};

// A variant of a kernel, "step_kernel<float, half, true, ParamRounding::NEAREST, SHORT_LIST>", for a GPU of a compute
// capability, 90, say. Throws the compiler's log. Safe with many threads and processes.
CompiledKernel compile(const std::string& kernel, int compute_capability);

// The same whatever is on disk, and kept there.
CompiledKernel compile_again(const std::string& kernel, int compute_capability);

}  // namespace ademamix

// Before the first compilation: the folder in which compiled code is kept, which need not exist; one that is only read,
// or ""; and NVRTC's file or name.
extern "C" void ademamix_set_up(const char* cache, const char* precompiled, const char* nvrtc);

// Another folder for what is compiled from now on, and none that is only read.
extern "C" void ademamix_set_cache(const char* cache);

// Compiles a kernel into the cache; nullptr, or what went wrong.
extern "C" const char* ademamix_compile(const char* kernel, int compute_capability);

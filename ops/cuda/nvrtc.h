// NVRTC, opened when it is first needed, from the file that Python found.
#pragma once

#include <cstdint>
#include <string>

namespace ademamix {

struct DeviceCode {
  std::string entry;  // the kernel's name in it
  std::string image;  // what cuModuleLoadData takes
};

void set_nvrtc(const std::string& path);

// "sm_90"; if this NVRTC doesn't know the GPU yet, the latest architecture that it knows, "compute_120", whose PTX the
// driver translates. Throws for GPUs that no kernel can be compiled for.
std::string architecture(int compute_capability);

// Returns everything that a compiled kernel depends on: the source, the options, and this very build of NVRTC.
uint64_t compiler_hash(const std::string& architecture);

// Returns the whole program, of which kernels are instantiations.
std::string program_source();

// Compiles a kernel; throws an error with the compiler's log.
DeviceCode compile_now(const std::string& kernel, const std::string& architecture);

// FNV-1a.
uint64_t hash(const std::string& text, uint64_t value = 0xcbf29ce484222325);

}  // namespace ademamix

// How the native libraries were built, for bug reports, and what the CUDA one counts. It links nothing of torch's.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#define QUOTE(x) #x
#define QUOTE_VALUE(x) QUOTE(x)

// Tensors in managed memory, their bytes, and the bytes prefetched, if the CUDA library there is loaded; else zeros.
static pybind11::tuple managed_memory(const std::string& cuda_library) {
  std::int64_t values[3] = {0, 0, 0};
  if (void* library = dlopen(cuda_library.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    using Read = void (*)(std::int64_t (&)[3]);
    if (const auto read = reinterpret_cast<Read>(dlsym(library, "ademamix_managed_memory"))) read(values);
    dlclose(library);
  }
  return pybind11::make_tuple(values[0], values[1], values[2]);
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "How torch_ademamix's native libraries were built, and what the CUDA one counts.";
  m.def("managed_memory", &managed_memory, pybind11::arg("cuda_library"));
  m.attr("built_with_torch") = BUILT_WITH_TORCH;
  m.attr("cpu_capabilities") = CPU_CAPABILITIES;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}

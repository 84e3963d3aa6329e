// How the native libraries were built, for bug reports. It links nothing of torch's.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used()) {
  m.doc() = "How torch_ademamix's native libraries were built.";
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

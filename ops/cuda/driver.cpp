#include "driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace ademamix {
namespace {

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_LAZY);
  if (!library) throw std::runtime_error(std::string("torch_ademamix: there is no CUDA driver: ") + dlerror());
  Driver functions;
  const auto find = [&](const char* name) {
    void* function = dlsym(library, name);
    if (!function) throw std::runtime_error(std::string("torch_ademamix: the CUDA driver is too old, without ") + name);
    return function;
  };
#define ADEMAMIX_FIND(name, ...) functions.name = reinterpret_cast<CUresult (*)(__VA_ARGS__)>(find(#name));
  ADEMAMIX_DRIVER_FUNCTIONS(ADEMAMIX_FIND)
#undef ADEMAMIX_FIND
  return functions;
}

}  // namespace

const Driver& driver() {
  static const Driver functions = open_driver();
  return functions;
}

void check_cuda(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char *name = "unknown error", *text = "";
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  throw std::runtime_error(std::string("torch_ademamix: ") + what + ": CUDA error: " + text + " (" + name + ")");
}

}  // namespace ademamix

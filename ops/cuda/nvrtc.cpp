#include "nvrtc.h"

#include <dirent.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

#include "file_status.h"

namespace ademamix {

extern const char DEVICE_SOURCE[];  // written by ../embed_sources.py

namespace {

constexpr int LOWEST_CAPABILITY = 70;  // below, kernels have no __grid_constant__ arguments

std::string file;

using Program = struct _nvrtcProgram*;

#define ADEMAMIX_NVRTC_FUNCTIONS(F)                                                                      \
  F(nvrtcVersion, int*, int*)                                                                            \
  F(nvrtcGetNumSupportedArchs, int*)                                                                     \
  F(nvrtcGetSupportedArchs, int*)                                                                        \
  F(nvrtcCreateProgram, Program*, const char*, const char*, int, const char* const*, const char* const*) \
  F(nvrtcAddNameExpression, Program, const char*)                                                        \
  F(nvrtcCompileProgram, Program, int, const char* const*)                                               \
  F(nvrtcGetProgramLogSize, Program, size_t*)                                                            \
  F(nvrtcGetProgramLog, Program, char*)                                                                  \
  F(nvrtcGetLoweredName, Program, const char*, const char**)                                             \
  F(nvrtcGetCUBINSize, Program, size_t*)                                                                 \
  F(nvrtcGetCUBIN, Program, char*)                                                                       \
  F(nvrtcGetPTXSize, Program, size_t*)                                                                   \
  F(nvrtcGetPTX, Program, char*)                                                                         \
  F(nvrtcDestroyProgram, Program*)

struct Nvrtc {
#define ADEMAMIX_DECLARE(name, ...) int (*name)(__VA_ARGS__);
  ADEMAMIX_NVRTC_FUNCTIONS(ADEMAMIX_DECLARE)
#undef ADEMAMIX_DECLARE
};

// NVRTC opens a second library by its name. If that isn't on the loader's path, it has to be open already.
void open_builtins() {
  const size_t end = file.rfind('/');
  if (end == std::string::npos) return;
  const std::string folder = file.substr(0, end);
  const std::unique_ptr<DIR, int (*)(DIR*)> open(opendir(folder.c_str()), closedir);
  while (const dirent* entry = open ? readdir(open.get()) : nullptr)
    if (std::string(entry->d_name).rfind("libnvrtc-builtins.so", 0) == 0)
      dlopen((folder + "/" + entry->d_name).c_str(), RTLD_LAZY);
}

Nvrtc open_nvrtc() {
  open_builtins();
  void* library = dlopen(file.c_str(), RTLD_LAZY);
  if (!library) throw std::runtime_error(std::string("torch_ademamix: there is no NVRTC: ") + dlerror());
  Nvrtc functions;
  const auto find = [&](const char* name) {
    void* function = dlsym(library, name);
    if (!function) throw std::runtime_error("torch_ademamix: " + file + " has no " + name);
    return function;
  };
#define ADEMAMIX_FIND(name, ...) functions.name = reinterpret_cast<int (*)(__VA_ARGS__)>(find(#name));
  ADEMAMIX_NVRTC_FUNCTIONS(ADEMAMIX_FIND)
#undef ADEMAMIX_FIND
  return functions;
}

const Nvrtc& nvrtc() {
  static const Nvrtc functions = open_nvrtc();
  return functions;
}

void check_nvrtc(int result, const char* what) {
  if (result != 0)
    throw std::runtime_error(std::string("torch_ademamix: ") + what + " failed: NVRTC error " + std::to_string(result));
}

// No contraction, as in host code (../value.h).
std::vector<std::string> options(const std::string& architecture) {
  return {"--gpu-architecture=" + architecture, "--std=c++17", "--fmad=false", "-default-device"};
}

// Identifies the build of NVRTC. Its version lacks the patch number, so this adds the size of its file and the file's
// beginning, where linkers put the build id and the addresses of all functions.
uint64_t nvrtc_hash() {
  int major, minor;
  check_nvrtc(nvrtc().nvrtcVersion(&major, &minor), "nvrtcVersion");
  std::string text = std::to_string(major) + '.' + std::to_string(minor);
  Dl_info where;
  struct stat status;
  if (dladdr(reinterpret_cast<void*>(nvrtc().nvrtcVersion), &where) &&
      file_status(AT_FDCWD, where.dli_fname, &status, 0) == 0) {
    text += ' ' + std::to_string(status.st_size) + ' ';
    std::string beginning(size_t{1} << 20, '\0');
    const std::unique_ptr<FILE, int (*)(FILE*)> open(std::fopen(where.dli_fname, "rb"), std::fclose);
    beginning.resize(open ? std::fread(beginning.data(), 1, beginning.size(), open.get()) : 0);
    text += beginning;
  }
  return hash(text);
}

}  // namespace

void set_nvrtc(const std::string& path) { file = path; }

uint64_t hash(const std::string& text, uint64_t value) {
  for (const unsigned char c : text) value = (value ^ c) * 0x100000001b3;
  return value;
}

std::string architecture(int compute_capability) {
  const std::string gpus = "GPUs of compute capability " + std::to_string(compute_capability / 10) + "." +
                           std::to_string(compute_capability % 10);
  const std::string instead =
      ": set the environment variable TORCH_ADEMAMIX_CUDA=0, and the reference kernels serve them";
  if (compute_capability < LOWEST_CAPABILITY)
    throw std::runtime_error("torch_ademamix: the CUDA kernels don't run on " + gpus + ", only from 7.0 on" + instead);
  int count = 0;
  check_nvrtc(nvrtc().nvrtcGetNumSupportedArchs(&count), "nvrtcGetNumSupportedArchs");
  std::vector<int> known(count);
  check_nvrtc(nvrtc().nvrtcGetSupportedArchs(known.data()), "nvrtcGetSupportedArchs");
  if (std::find(known.begin(), known.end(), compute_capability) != known.end())
    return "sm_" + std::to_string(compute_capability);
  int latest = 0;
  for (const int each : known)
    if (each < compute_capability) latest = std::max(latest, each);
  if (latest == 0)
    throw std::runtime_error("torch_ademamix: the NVRTC of this CUDA can't compile for " + gpus + instead +
                             "; or install a torch with an earlier CUDA");
  return "compute_" + std::to_string(latest);
}

std::string program_source() { return std::string(DEVICE_SOURCE) + "\nusing namespace ademamix;\n"; }

uint64_t compiler_hash(const std::string& architecture) {
  static const uint64_t fixed = hash(program_source(), nvrtc_hash());
  uint64_t value = fixed;
  for (const std::string& option : options(architecture)) value = hash(option + ' ', value);
  return value;
}

DeviceCode compile_now(const std::string& kernel, const std::string& architecture) {
  Program program;
  check_nvrtc(nvrtc().nvrtcCreateProgram(&program, program_source().c_str(), "torch_ademamix.cu", 0, nullptr, nullptr),
              "nvrtcCreateProgram");
  struct Destroy {
    Program program;
    ~Destroy() { nvrtc().nvrtcDestroyProgram(&program); }
  } destroy{program};

  check_nvrtc(nvrtc().nvrtcAddNameExpression(program, kernel.c_str()), "nvrtcAddNameExpression");
  const auto words = options(architecture);
  std::vector<const char*> arguments;
  for (const std::string& word : words) arguments.push_back(word.c_str());
  if (nvrtc().nvrtcCompileProgram(program, static_cast<int>(arguments.size()), arguments.data()) != 0) {
    size_t bytes = 0;
    nvrtc().nvrtcGetProgramLogSize(program, &bytes);
    std::string log(bytes, '\0');
    if (bytes) nvrtc().nvrtcGetProgramLog(program, log.data());
    throw std::runtime_error("torch_ademamix: NVRTC could not compile " + kernel + " for " + architecture + ":\n" +
                             log.c_str());
  }

  const char* entry;
  check_nvrtc(nvrtc().nvrtcGetLoweredName(program, kernel.c_str(), &entry), "nvrtcGetLoweredName");
  const bool is_ptx = architecture.rfind("compute_", 0) == 0;
  size_t bytes;
  check_nvrtc((is_ptx ? nvrtc().nvrtcGetPTXSize : nvrtc().nvrtcGetCUBINSize)(program, &bytes), "the code's size");
  std::string image(bytes, '\0');
  check_nvrtc((is_ptx ? nvrtc().nvrtcGetPTX : nvrtc().nvrtcGetCUBIN)(program, image.data()), "the code");
  return {entry, image};
}

}  // namespace ademamix

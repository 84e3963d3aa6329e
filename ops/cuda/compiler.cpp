#include "compiler.h"

#include <dirent.h>
#include <dlfcn.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <vector>

namespace ademamix {
namespace {

struct {
  std::string sources, cache, nvrtc;
} settings;

// ------------------------------------------------------------------------------------------------------------- files

// By C's functions. Of C++'s files, streams and locales libtorch, or this library, may have copies of another
// compiler's, and the loader mixes them.

using File = std::unique_ptr<FILE, int (*)(FILE*)>;

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// The paths of what is in a folder, sorted; nothing where there is no such folder.
std::vector<std::string> paths_in(const std::string& folder) {
  std::vector<std::string> paths;
  const std::unique_ptr<DIR, int (*)(DIR*)> open(opendir(folder.c_str()), closedir);
  if (!open) return paths;
  while (const dirent* entry = readdir(open.get())) paths.push_back(folder + "/" + entry->d_name);
  std::sort(paths.begin(), paths.end());
  return paths;
}

void make_folders(const std::string& path) {
  for (size_t end = 1; end != std::string::npos;) {
    end = path.find('/', end + 1);
    mkdir(path.substr(0, end).c_str(), 0777);
  }
}

// Nothing, where there is no such file.
std::string read_file(const std::string& path) {
  std::string text;
  const File file(std::fopen(path.c_str(), "rb"), std::fclose);
  char part[1 << 16];
  while (const size_t bytes = file ? std::fread(part, 1, sizeof part, file.get()) : 0) text.append(part, bytes);
  return text;
}

bool write_file(const std::string& path, const std::string& text) {
  FILE* const file = std::fopen(path.c_str(), "wb");
  if (!file) return false;
  const bool written = std::fwrite(text.data(), 1, text.size(), file) == text.size();
  return std::fclose(file) == 0 && written;
}

// ------------------------------------------------------------------------------------------------------------- NVRTC

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

// NVRTC opens a second library by its name alone; where that isn't on the loader's path, it has to be there already.
void open_builtins() {
  const size_t end = settings.nvrtc.rfind('/');
  if (end == std::string::npos) return;
  for (const std::string& path : paths_in(settings.nvrtc.substr(0, end)))
    if (path.find("/libnvrtc-builtins.so", end) == end) dlopen(path.c_str(), RTLD_LAZY);
}

Nvrtc open_nvrtc() {
  open_builtins();
  void* library = dlopen(settings.nvrtc.c_str(), RTLD_LAZY);
  if (!library) throw std::runtime_error(std::string("torch_ademamix: there is no NVRTC: ") + dlerror());
  Nvrtc functions;
  const auto find = [&](const char* name) {
    void* function = dlsym(library, name);
    if (!function) throw std::runtime_error("torch_ademamix: " + settings.nvrtc + " has no " + name);
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

// "sm_90"; where this NVRTC doesn't know the GPU yet, the latest architecture that it knows, "compute_120", whose PTX
// the driver translates.
std::string architecture(int compute_capability) {
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
    throw std::runtime_error("torch_ademamix: this CUDA has no code for GPUs of compute capability " +
                             std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10));
  return "compute_" + std::to_string(latest);
}

// No contraction, as for the host's code (../value.h).
std::vector<std::string> options(const std::string& architecture) {
  return {"--gpu-architecture=" + architecture, "--std=c++17", "--fmad=false", "-default-device"};
}

DeviceCode compile_now(const KernelName& kernel, const std::string& architecture) {
  const std::string source = "#include \"cuda/" + std::string(kernel.header) + "\"\nusing namespace ademamix;\n";
  const std::vector<const char*> standard_headers{"cfloat", "cmath", "cstdint", "cstring", "type_traits"};
  const std::vector<const char*> contents(standard_headers.size(), "#include \"cuda/std.cuh\"\n");
  Program program;
  check_nvrtc(nvrtc().nvrtcCreateProgram(&program, source.c_str(), "torch_ademamix.cu",
                                         static_cast<int>(contents.size()), contents.data(), standard_headers.data()),
              "nvrtcCreateProgram");
  struct Destroy {
    Program program;
    ~Destroy() { nvrtc().nvrtcDestroyProgram(&program); }
  } destroy{program};

  const char* expression = kernel.expression.c_str();
  check_nvrtc(nvrtc().nvrtcAddNameExpression(program, expression), "nvrtcAddNameExpression");
  auto words = options(architecture);
  words.push_back("--include-path=" + settings.sources);
  std::vector<const char*> arguments;
  for (const std::string& word : words) arguments.push_back(word.c_str());
  if (nvrtc().nvrtcCompileProgram(program, static_cast<int>(arguments.size()), arguments.data()) != 0) {
    size_t bytes = 0;
    nvrtc().nvrtcGetProgramLogSize(program, &bytes);
    std::string log(bytes, '\0');
    if (bytes) nvrtc().nvrtcGetProgramLog(program, log.data());
    throw std::runtime_error("torch_ademamix: NVRTC could not compile " + kernel.expression + " for " + architecture +
                             ":\n" + log.c_str());
  }

  const char* entry;
  check_nvrtc(nvrtc().nvrtcGetLoweredName(program, expression, &entry), "nvrtcGetLoweredName");
  const bool is_ptx = architecture.rfind("compute_", 0) == 0;
  size_t bytes;
  check_nvrtc((is_ptx ? nvrtc().nvrtcGetPTXSize : nvrtc().nvrtcGetCUBINSize)(program, &bytes), "the code's size");
  std::string image(bytes, '\0');
  check_nvrtc((is_ptx ? nvrtc().nvrtcGetPTX : nvrtc().nvrtcGetCUBIN)(program, image.data()), "the code");
  return {entry, image};
}

// --------------------------------------------------------------------------------------------------------- the cache

// FNV-1a.
uint64_t hash(const std::string& text, uint64_t value = 0xcbf29ce484222325) {
  for (const unsigned char c : text) value = (value ^ c) * 0x100000001b3;
  return value;
}

// Of all that device code may include.
uint64_t hash_of_sources() {
  uint64_t value = hash("");
  for (const char* folder : {"", "/cuda"})
    for (const std::string& path : paths_in(settings.sources + folder))
      if (ends_with(path, ".h") || ends_with(path, ".cuh"))
        value = hash(read_file(path), hash(path.substr(settings.sources.size()), value));
  return value;
}

std::string cache_file(const KernelName& kernel, const std::string& architecture) {
  static const uint64_t sources = hash_of_sources();
  int major, minor;
  check_nvrtc(nvrtc().nvrtcVersion(&major, &minor), "nvrtcVersion");
  std::string key = std::to_string(sources) + ' ' + std::to_string(major) + '.' + std::to_string(minor) + ' ' +
                    kernel.header + ' ' + kernel.expression;
  for (const std::string& option : options(architecture)) key += ' ' + option;
  char name[17];
  std::snprintf(name, sizeof name, "%016llx", static_cast<unsigned long long>(hash(key)));
  return settings.cache + "/" + kernel.expression.substr(0, kernel.expression.find('<')) + "-" + architecture + "-" +
         name + ".bin";
}

// A file has a line with the kernel's name, the number of bytes of code and their hash; and then these.
std::string header_line(const DeviceCode& code) {
  return code.entry + ' ' + std::to_string(code.image.size()) + ' ' + std::to_string(hash(code.image)) + '\n';
}

bool read_cache(const std::string& path, DeviceCode& code) {
  const std::string text = read_file(path);
  const size_t end = text.find('\n');
  if (end == std::string::npos) return false;
  code = {text.substr(0, text.find(' ')), text.substr(end + 1)};
  return text.compare(0, end + 1, header_line(code)) == 0;
}

// Whoever reads sees the whole file or none. A folder that can't be written to costs a compilation per process.
void write_cache(const std::string& path, const DeviceCode& code) {
  static std::atomic<int> number{0};
  make_folders(settings.cache);
  const std::string written = path + "." + std::to_string(getpid()) + "." + std::to_string(number++);
  if (!write_file(written, header_line(code) + code.image) || std::rename(written.c_str(), path.c_str()) != 0)
    std::remove(written.c_str());
}

}  // namespace

DeviceCode compile(const KernelName& kernel, int compute_capability) {
  const std::string target = architecture(compute_capability);
  const std::string path = cache_file(kernel, target);
  DeviceCode code;
  if (read_cache(path, code)) return code;
  static const bool told = std::fprintf(stderr, "torch_ademamix: compiling CUDA kernels for %s, to be kept in %s\n",
                                        target.c_str(), settings.cache.c_str()) > 0;
  static_cast<void>(told);
  code = compile_now(kernel, target);
  write_cache(path, code);
  return code;
}

}  // namespace ademamix

extern "C" __attribute__((visibility("default"))) void ademamix_set_up(const char* sources, const char* cache,
                                                                       const char* nvrtc) {
  ademamix::settings.sources = sources;
  ademamix::settings.cache = cache;
  ademamix::settings.nvrtc = nvrtc;
}

extern "C" __attribute__((visibility("default"))) const char* ademamix_compile(const char* header,
                                                                               const char* expression,
                                                                               int compute_capability) {
  static thread_local std::string error;
  try {
    ademamix::compile({header, expression}, compute_capability);
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}

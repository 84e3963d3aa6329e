#include "compiler.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "code_folder.h"

namespace ademamix {
namespace {

// For debugging: whether each kernel and its compile time are printed, and a folder for sources and machine code.
constexpr char VERBOSE[] = "TORCH_ADEMAMIX_VERBOSE", DUMP[] = "TORCH_ADEMAMIX_DUMP";

struct {
  std::string cache, precompiled;
} settings;

// A kernel for an architecture.
struct Target {
  std::string kernel, architecture, file;

  Target(const std::string& kernel, int compute_capability)
      : kernel(kernel), architecture(ademamix::architecture(compute_capability)) {
    char key[17];
    std::snprintf(key, sizeof key, "%016llx",
                  static_cast<unsigned long long>(hash(kernel, compiler_hash(architecture))));
    file = kernel.substr(0, kernel.find('<')) + "-" + architecture + "-" + key + ".bin";
  }

  bool is_ptx() const { return architecture.rfind("compute_", 0) == 0; }
};

bool is_verbose() {
  const char* value = std::getenv(VERBOSE);
  return value && *value && std::string(value) != "0";
}

void write_text(const std::string& path, const std::string& text) {
  FILE* const file = std::fopen(path.c_str(), "wb");
  if (!file) return;
  std::fwrite(text.data(), 1, text.size(), file);
  std::fclose(file);
}

void report(const Target& target, const DeviceCode& code, const std::string& origin) {
  if (is_verbose())
    std::fprintf(stderr, "torch_ademamix: %s for %s: %s, %zu bytes\n", target.kernel.c_str(),
                 target.architecture.c_str(), origin.c_str(), code.image.size());
  const char* folder = std::getenv(DUMP);
  if (!folder || !*folder) return;
  make_folders(folder);
  const std::string path = std::string(folder) + "/" + target.file.substr(0, target.file.rfind('.'));
  write_text(path + ".cu", "// " + target.kernel + "\n" + program_source());
  write_text(path + (target.is_ptx() ? ".ptx" : ".cubin"), code.image);
}

CompiledKernel compile_and_keep(const CodeFolder& cache, const Target& target) {
  if (cache.speaks()) {
    static const bool told = std::fprintf(stderr, "torch_ademamix: compiling CUDA kernels for %s, to be kept in %s\n",
                                          target.architecture.c_str(), cache.path().c_str()) > 0;
    static_cast<void>(told);
  }
  const auto begin = std::chrono::steady_clock::now();
  const DeviceCode code = compile_now(target.kernel, target.architecture);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  cache.write(target.file, code);
  char origin[64];
  std::snprintf(origin, sizeof origin, "compiled in %.2f s", took.count());
  report(target, code, origin);
  return {code, false};
}

}  // namespace

CompiledKernel compile(const std::string& kernel, int compute_capability) {
  const Target target(kernel, compute_capability);
  const CodeFolder cache(settings.cache, /*trusts_owner=*/false);
  CompiledKernel result;
  const auto found_in = [&](const CodeFolder& folder) {
    result.from_disk = folder.read(target.file, result.code);
    if (result.from_disk) report(target, result.code, "from " + folder.path());
    return result.from_disk;
  };
  if (!settings.precompiled.empty() && found_in(CodeFolder(settings.precompiled, /*trusts_owner=*/true))) return result;
  if (found_in(cache)) return result;
  cache.alone(target.file, [&] { return found_in(cache); }, [&] { result = compile_and_keep(cache, target); });
  return result;
}

CompiledKernel compile_again(const std::string& kernel, int compute_capability) {
  return compile_and_keep(CodeFolder(settings.cache, /*trusts_owner=*/false), Target(kernel, compute_capability));
}

}  // namespace ademamix

extern "C" __attribute__((visibility("default"))) void ademamix_set_up(const char* cache, const char* precompiled,
                                                                       const char* nvrtc) {
  ademamix::settings.cache = cache;
  ademamix::settings.precompiled = precompiled;
  ademamix::set_nvrtc(nvrtc);
}

extern "C" __attribute__((visibility("default"))) void ademamix_set_cache(const char* cache) {
  ademamix::settings.cache = cache;
  ademamix::settings.precompiled = "";
}

extern "C" __attribute__((visibility("default"))) const char* ademamix_compile(const char* kernel,
                                                                               int compute_capability) {
  static thread_local std::string error;
  try {
    ademamix::compile(kernel, compute_capability);
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}

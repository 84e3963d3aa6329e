// A stand-in for libcuda, NVRTC, and what libtorch_cuda has of torch's streams. It "compiles" a kernel to its name, by
// which it then finds the kernel's own source, built for the host, and it keeps a log of what it was called for.
#include "cuda_on_host.h"

#include <unistd.h>

#include <csignal>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../ops/cuda/blockwise_kernel.cuh"
#include "../../ops/cuda/driver.h"
#include "../../ops/cuda/prologue.cuh"
#include "../../ops/cuda/step_kernel.cuh"

using namespace ademamix;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// ------------------------------------------------------------------------------------------------------- the kernels

using Launch = std::function<void(unsigned int ctas, unsigned int threads, void** arguments)>;
std::map<std::string, Launch> kernels;

template <class... Parameters, size_t... I>
Launch launch_of(void (*kernel)(Parameters...), std::index_sequence<I...>) {
  return [=](unsigned int ctas, unsigned int threads, void** arguments) {
    static_assert((sizeof(Parameters) + ... + 0) <= ARGUMENT_BYTES);
    cuda_on_host::launch(ctas, threads, [=] { kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...); });
  };
}

template <class... Parameters>
Launch launch_of(void (*kernel)(Parameters...)) {
  return launch_of(kernel, std::index_sequence_for<Parameters...>{});
}

// To spare the compiler every kernel's second variant, a short list runs in the one for long lists.
template <class Record, class... Others>
Launch short_launch_of(void (*kernel)(TensorTable<Record, LONG_LIST<Record>>, Others...)) {
  return [=](unsigned int ctas, unsigned int threads, void** arguments) {
    const auto& list = *static_cast<const TensorTable<Record, SHORT_LIST>*>(arguments[0]);
    static TensorTable<Record, LONG_LIST<Record>> table;
    std::copy_n(list.records, list.count, table.records);
    std::copy_n(list.end_tile, list.count, table.end_tile);
    table.count = list.count;
    table.first = list.first;
    std::vector<void*> replaced(arguments, arguments + 1 + sizeof...(Others));
    replaced[0] = &table;
    launch_of(kernel)(ctas, threads, replaced.data());
  };
}

template <class Record, class... Others>
void add_step(const std::string& name, const std::string& record,
              void (*kernel)(TensorTable<Record, LONG_LIST<Record>>, Others...)) {
  kernels[name + ", LONG_LIST<" + record + ">>"] = launch_of(kernel);
  kernels[name + ", SHORT_LIST>"] = short_launch_of(kernel);
}

template <class T>
std::string name_of(T) {
  if constexpr (std::is_same_v<T, float>) return "float";
  if constexpr (std::is_same_v<T, double>) return "double";
  if constexpr (std::is_same_v<T, bfloat16>) return "bfloat16";
  if constexpr (std::is_same_v<T, half>) return "half";
  if constexpr (std::is_same_v<T, SignedSqrt>) return "SignedSqrt";
  if constexpr (std::is_same_v<T, FourthRoot>) return "FourthRoot";
  if constexpr (std::is_same_v<T, Linear>) return "Linear";
  if constexpr (std::is_same_v<T, NoCodes>) return "NoCodes";
  if constexpr (std::is_same_v<T, Linear12>) return "Linear12";
  if constexpr (std::is_same_v<T, SignedSqrt4>) return "SignedSqrt4";
  if constexpr (std::is_same_v<T, FourthRoot4>) return "FourthRoot4";
}

template <auto VALUE>
using Constant = std::integral_constant<decltype(VALUE), VALUE>;

template <class... Values, class Use>
void for_each(const Use& use) {
  (use(Values{}), ...);
}

template <class Use>
void for_each_dtype(const Use& use) {
  for_each<float, double, bfloat16, half>(use);
}

template <class P, class Use>
void for_each_rounding(const Use& use) {
  use(Constant<ParamRounding::NEAREST>{}, "ParamRounding::NEAREST");
  if constexpr (std::is_same_v<P, bfloat16>) {
    use(Constant<ParamRounding::REMAINDER>{}, "ParamRounding::REMAINDER");
    use(Constant<ParamRounding::REMAINDER8>{}, "ParamRounding::REMAINDER8");
    use(Constant<ParamRounding::STOCHASTIC>{}, "ParamRounding::STOCHASTIC");
  }
}

template <class T>
void add_prologues() {
  const std::string name = "prologue_kernel<" + name_of(T{});
  kernels[name + ", SHORT_LIST, 1>"] = launch_of(prologue_kernel<T, SHORT_LIST, 1>);
  kernels[name + ", LONG_STEP_LIST<1>, 1>"] = launch_of(prologue_kernel<T, LONG_STEP_LIST<1>, 1>);
  kernels[name + ", LONG_STEP_LIST<MANY_ROWS>, MANY_ROWS>"] =
      launch_of(prologue_kernel<T, LONG_STEP_LIST<MANY_ROWS>, MANY_ROWS>);
}

template <class P, class G, class Fast, class Slow, class Sq, bool STOCHASTIC, ParamRounding ROUNDING>
void add_blockwise_step(const std::string& dtypes, const std::string& rounding) {
  add_step("blockwise_step_kernel<" + dtypes + name_of(Fast{}) + ", " + name_of(Slow{}) + ", " + name_of(Sq{}) +
               (STOCHASTIC ? ", true, " : ", false, ") + rounding,
           "BlockwiseRecord",
           blockwise_step_kernel<P, G, Fast, Slow, Sq, STOCHASTIC, ROUNDING, LONG_LIST<BlockwiseRecord>>);
}

// The compiler takes a second or more for each variant under the sanitizers. So all pairs of dtypes are there for the
// 32-bit step and the first of the formats; the other variants for the pairs that people train with.
template <class P, class G>
constexpr bool IS_COMMON = (std::is_same_v<P, bfloat16> && sizeof(G) != 8 && !std::is_same_v<G, half>) ||
                           (std::is_same_v<P, float> && std::is_same_v<G, float>);

template <class P, class G, ParamRounding ROUNDING>
void add_steps(const std::string& dtypes, const std::string& rounding) {
  const auto add_32_bit_step = [&](auto exp_avg) {
    add_step("step_kernel<" + dtypes + (exp_avg() ? "true, " : "false, ") + rounding, "StepRecord",
             step_kernel<P, G, exp_avg(), ROUNDING, LONG_LIST<StepRecord>>);
  };
  add_32_bit_step(std::true_type{});
  add_blockwise_step<P, G, SignedSqrt, Linear, FourthRoot, true, ROUNDING>(dtypes, rounding);
  if constexpr (std::is_same_v<P, G>)
    add_blockwise_step<P, G, SignedSqrt, Linear, FourthRoot, false, ROUNDING>(dtypes, rounding);
  if constexpr (IS_COMMON<P, G>) {
    add_32_bit_step(std::false_type{});
    for_each<std::true_type, std::false_type>([&](auto stochastic) {
      constexpr bool STOCHASTIC = decltype(stochastic)::value;
      if constexpr (STOCHASTIC || std::is_same_v<P, float>) {
        add_blockwise_step<P, G, SignedSqrt, SignedSqrt, FourthRoot, STOCHASTIC, ROUNDING>(dtypes, rounding);
        add_blockwise_step<P, G, NoCodes, Linear, FourthRoot, STOCHASTIC, ROUNDING>(dtypes, rounding);
        add_blockwise_step<P, G, NoCodes, SignedSqrt, FourthRoot, STOCHASTIC, ROUNDING>(dtypes, rounding);
        add_blockwise_step<P, G, SignedSqrt4, Linear12, FourthRoot, STOCHASTIC, ROUNDING>(dtypes, rounding);
        add_blockwise_step<P, G, NoCodes, Linear12, FourthRoot4, STOCHASTIC, ROUNDING>(dtypes, rounding);
      }
    });
  }
}

template <class Format>
void add_format() {
  const std::string name = name_of(Format{});
  kernels["quantize_kernel<" + name + ", false>"] = launch_of(quantize_kernel<Format, false>);
  if constexpr (Format::POSITION_ZERO != 0)
    kernels["quantize_kernel<" + name + ", true>"] = launch_of(quantize_kernel<Format, true>);
  kernels["dequantize_kernel<" + name + ">"] = launch_of(dequantize_kernel<Format>);
}

const bool added = [] {
  add_prologues<float>();
  add_prologues<double>();
  for_each_dtype([](auto p) {
    for_each_dtype([=](auto g) {
      using P = decltype(p);
      using G = decltype(g);
      for_each_rounding<P>([=](auto rounding, const std::string& rounding_name) {
        add_steps<P, G, rounding()>(name_of(p) + ", " + name_of(g) + ", ", rounding_name);
      });
    });
  });
  add_format<SignedSqrt>();
  add_format<FourthRoot>();
  add_format<Linear>();
  add_format<Linear12>();
  add_format<SignedSqrt4>();
  add_format<FourthRoot4>();
  return true;
}();

// -------------------------------------------------------------------------------------- what tests set and look at

std::string log_text;
std::map<std::string, int> failures;  // results of the next call of a function
std::map<int, int> attributes{{CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 2},
                              {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
                              {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
                              {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
                              {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1}};
size_t free_bytes = size_t{1} << 40;
bool capturing = false;
void* current_stream = nullptr;
int contexts = 0;  // that are pushed now
int compile_ms = 0;
bool dies_compiling = false;
int freed = 0;

int failure(const char* function) {
  const auto node = failures.extract(function);
  return node ? node.mapped() : 0;
}

int logged(const char* function, const char* word) {
  if (const int result = failure(function)) return result;
  log_text += std::string(word) + ' ';
  return 0;
}

const char* side(CUstream stream) { return stream == current_stream ? "main" : "side"; }

struct NvrtcProgram {
  std::string source, expression;
};

}  // namespace

EXPORT const char* take_log() {
  static std::string last;
  last = std::exchange(log_text, "");
  return last.c_str();
}
EXPORT void fail_next(const char* function, int result) { failures[function] = result; }
EXPORT void set_attribute(int number, int value) { attributes[number] = value; }
EXPORT void set_free_bytes(size_t bytes) { free_bytes = bytes; }
EXPORT void set_capturing(bool value) { capturing = value; }
EXPORT void set_current_stream(void* stream) { current_stream = stream; }
EXPORT int pushed_contexts() { return contexts; }
EXPORT void set_compile_ms(int value) { compile_ms = value; }
EXPORT void set_dies_compiling(bool value) { dies_compiling = value; }
EXPORT int freed_blocks() { return freed; }
EXPORT const char* kernel_names() {
  static std::string names;
  for (const auto& [name, launch] : kernels) names += name + '\n';
  return names.c_str();
}
EXPORT int steps_of_a_launch() { return LONG_STEP_LIST<1>; }
EXPORT int rows_of_a_launch() { return MANY_ROWS; }
EXPORT int tensors_of_a_launch() { return LONG_LIST<StepRecord>; }
EXPORT int blockwise_tensors_of_a_launch() { return LONG_LIST<BlockwiseRecord>; }

// ------------------------------------------------------------------------------------------------- torch, and NVRTC

EXPORT int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = current_stream;
  return 0;
}

EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return 0;
}
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  *count = 2;
  return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* architectures) {
  architectures[0] = 75, architectures[1] = 90;
  return 0;
}
EXPORT int nvrtcCreateProgram(NvrtcProgram** program, const char* source, const char*, int, const char* const*,
                              const char* const*) {
  *program = new NvrtcProgram{source, ""};
  return failure("nvrtcCreateProgram");
}
EXPORT int nvrtcAddNameExpression(NvrtcProgram* program, const char* expression) {
  program->expression = expression;
  return 0;
}
EXPORT int nvrtcCompileProgram(NvrtcProgram*, int count, const char* const* options) {
  for (int i = 0; i < count; ++i)
    if (const std::string option = options[i]; option.rfind("--gpu-architecture=", 0) == 0)
      log_text += "compile-" + option.substr(19) + ' ';
  usleep(1000 * static_cast<useconds_t>(compile_ms));
  if (dies_compiling) std::raise(SIGKILL);
  return failure("nvrtcCompileProgram");
}
constexpr char COMPILER_LOG[] = "kernel.cu(1): error: as the test wants it";
EXPORT int nvrtcGetProgramLogSize(NvrtcProgram*, size_t* bytes) {
  *bytes = sizeof COMPILER_LOG;
  return 0;
}
EXPORT int nvrtcGetProgramLog(NvrtcProgram*, char* text) {
  std::memcpy(text, COMPILER_LOG, sizeof COMPILER_LOG);
  return 0;
}
EXPORT int nvrtcGetLoweredName(NvrtcProgram* program, const char*, const char** name) {
  // A mangled name has no spaces.
  for (char& c : program->expression)
    if (c == ' ') c = '_';
  *name = program->expression.c_str();
  return 0;
}
EXPORT int nvrtcGetCUBINSize(NvrtcProgram* program, size_t* bytes) {
  *bytes = program->expression.size();
  return 0;
}
EXPORT int nvrtcGetCUBIN(NvrtcProgram* program, char* code) {
  program->expression.copy(code, program->expression.size());
  return 0;
}
EXPORT int nvrtcGetPTXSize(NvrtcProgram* program, size_t* bytes) { return nvrtcGetCUBINSize(program, bytes); }
EXPORT int nvrtcGetPTX(NvrtcProgram* program, char* code) { return nvrtcGetCUBIN(program, code); }
EXPORT int nvrtcDestroyProgram(NvrtcProgram** program) {
  delete *program;
  return 0;
}

// ----------------------------------------------------------------------------------------------------------- libcuda

EXPORT int cuGetErrorName(int result, const char** text) {
  *text = result == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_UNKNOWN";
  return 0;
}
EXPORT int cuGetErrorString(int result, const char** text) {
  *text = result == 2 ? "out of memory" : "unknown error";
  return 0;
}
EXPORT int cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return failure("cuDeviceGet");
}
EXPORT int cuDeviceGetAttribute(int* value, int number, CUdevice) {
  *value = attributes.at(number);
  return failure("cuDeviceGetAttribute");
}
EXPORT int cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 2);  // not null; the CPU's index is -1
  return failure("cuDevicePrimaryCtxRetain");
}
EXPORT int cuCtxPushCurrent_v2(CUcontext) {
  if (const int result = failure("cuCtxPushCurrent_v2")) return result;
  ++contexts;
  return 0;
}
EXPORT int cuCtxPopCurrent_v2(CUcontext*) {
  --contexts;
  return 0;
}
EXPORT int cuModuleLoadData(CUmodule* module, const void* code) {
  *module = static_cast<CUmodule>(const_cast<void*>(code));
  return logged("cuModuleLoadData", "load");
}
EXPORT int cuModuleGetFunction(CUfunction* function, CUmodule, const char* entry) {
  std::string name = entry;
  for (char& c : name)
    if (c == '_' && &c > name.data() && (&c)[-1] == ',') c = ' ';
  const auto found = kernels.find(name);
  if (found == kernels.end()) return 500;
  *function = reinterpret_cast<CUfunction>(&found->second);
  return failure("cuModuleGetFunction");
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, CUfunction, int, size_t) {
  *ctas = 3;
  return failure("cuOccupancyMaxActiveBlocksPerMultiprocessor");
}
EXPORT int cuLaunchKernel(CUfunction function, unsigned int ctas, unsigned int y, unsigned int z, unsigned int threads,
                          unsigned int, unsigned int, unsigned int, CUstream stream, void** arguments, void**) {
  if (ctas == 0 || threads == 0 || threads > 1024 || y != 1 || z != 1 || contexts == 0) return 1;
  if (stream != current_stream) return 400;
  if (const int result = logged("cuLaunchKernel", "launch")) return result;
  (*reinterpret_cast<const Launch*>(function))(ctas, threads, arguments);
  return 0;
}

EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
  *free = free_bytes, *total = size_t{1} << 40;
  return 0;
}
EXPORT int cuMemAllocManaged(CUdeviceptr* data, size_t bytes, unsigned int) {
  if (contexts == 0) return 201;
  if (const int result = failure("cuMemAllocManaged")) return result;
  *data = reinterpret_cast<CUdeviceptr>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return 0;
}
EXPORT int cuMemFree_v2(CUdeviceptr data) {
  if (contexts == 0) return 201;
  ++freed;
  std::free(reinterpret_cast<void*>(data));
  return 0;
}
EXPORT int cuMemAdvise(CUdeviceptr, size_t, int, CUdevice) { return failure("cuMemAdvise"); }
EXPORT int cuMemPrefetchAsync(CUdeviceptr, size_t, CUdevice device, CUstream) {
  return logged("cuMemPrefetchAsync", device == CU_DEVICE_CPU ? "page-out" : "prefetch");
}
EXPORT int cuStreamCreate(CUstream* stream, unsigned int) {
  *stream = reinterpret_cast<CUstream>(0x51de);
  return 0;
}
EXPORT int cuStreamSynchronize(CUstream) { return 0; }
EXPORT int cuStreamWaitEvent(CUstream stream, CUevent, unsigned int) {
  return logged("cuStreamWaitEvent", (std::string(side(stream)) + "-waits").c_str());
}
EXPORT int cuStreamIsCapturing(CUstream, int* status) {
  *status = capturing;
  return 0;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
EXPORT int cuEventCreate(CUevent* event, unsigned int) {
  *event = nullptr;
  return 0;
}
EXPORT int cuEventRecord(CUevent, CUstream stream) {
  return logged("cuEventRecord", (std::string(side(stream)) + "-records").c_str());
}

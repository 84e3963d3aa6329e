// libcuda, opened when it is first needed, so that this library loads on every machine and with every torch. Its
// functions are declared as in cuda.h; drivers of CUDA 12 and 13 have them under these names.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ademamix {

using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUresult = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;

constexpr CUresult CUDA_SUCCESS = 0;

constexpr int CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY = 83;
constexpr int CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS = 89;

constexpr unsigned int CU_MEM_ATTACH_GLOBAL = 1;
constexpr int CU_MEM_ADVISE_SET_PREFERRED_LOCATION = 3;
constexpr CUdevice CU_DEVICE_CPU = -1;
constexpr unsigned int CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned int CU_EVENT_DISABLE_TIMING = 2;
constexpr int CU_STREAM_CAPTURE_STATUS_NONE = 0;
constexpr int CU_STREAM_CAPTURE_MODE_RELAXED = 2;

#define ADEMAMIX_DRIVER_FUNCTIONS(F)                                                                                \
  F(cuGetErrorName, CUresult, const char**)                                                                         \
  F(cuGetErrorString, CUresult, const char**)                                                                       \
  F(cuDeviceGet, CUdevice*, int)                                                                                    \
  F(cuDeviceGetAttribute, int*, int, CUdevice)                                                                      \
  F(cuDevicePrimaryCtxRetain, CUcontext*, CUdevice)                                                                 \
  F(cuCtxPushCurrent_v2, CUcontext)                                                                                 \
  F(cuCtxPopCurrent_v2, CUcontext*)                                                                                 \
  F(cuModuleLoadData, CUmodule*, const void*)                                                                       \
  F(cuModuleGetFunction, CUfunction*, CUmodule, const char*)                                                        \
  F(cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, CUfunction, int, size_t)                                     \
  F(cuLaunchKernel, CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, \
    unsigned int, CUstream, void**, void**)                                                                         \
  F(cuMemGetInfo_v2, size_t*, size_t*)                                                                              \
  F(cuMemAllocManaged, CUdeviceptr*, size_t, unsigned int)                                                          \
  F(cuMemFree_v2, CUdeviceptr)                                                                                      \
  F(cuMemAdvise, CUdeviceptr, size_t, int, CUdevice)                                                                \
  F(cuMemPrefetchAsync, CUdeviceptr, size_t, CUdevice, CUstream)                                                    \
  F(cuStreamCreate, CUstream*, unsigned int)                                                                        \
  F(cuStreamSynchronize, CUstream)                                                                                  \
  F(cuStreamWaitEvent, CUstream, CUevent, unsigned int)                                                             \
  F(cuStreamIsCapturing, CUstream, int*)                                                                            \
  F(cuThreadExchangeStreamCaptureMode, int*)                                                                        \
  F(cuEventCreate, CUevent*, unsigned int)                                                                          \
  F(cuEventRecord, CUevent, CUstream)

struct Driver {
#define ADEMAMIX_DECLARE(name, ...) CUresult (*name)(__VA_ARGS__);
  ADEMAMIX_DRIVER_FUNCTIONS(ADEMAMIX_DECLARE)
#undef ADEMAMIX_DECLARE
};

const Driver& driver();

// Raises an exception for an error; `what` is what was tried.
void check_cuda(CUresult result, const char* what);

}  // namespace ademamix

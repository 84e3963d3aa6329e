// The first kernel of a step: advances each tensor's step and computes its scalars, on the device, so that a replayed
// CUDA graph goes on with its schedules.
#pragma once

#include "../ademamix.h"
#include "../view.h"
#include "multi_tensor.cuh"
#include "runtime.h"

namespace ademamix {

// A number of the host, or one in device memory that is read when the kernel runs.
struct Scalar {
  double value;
  const float* float32;
  const double* float64;

  __device__ double get() const { return float64 ? *float64 : float32 ? *float32 : value; }
};

// What a step's scalars are computed from, beside the steps.
struct StepNumbers {
  Hyperparameters h;
  Scalar in_memory;  // where it has a pointer, all but h.maximize is read there (read_hyperparameters)
  Scalar lr, grad_scale;
  const float* found_inf;

  __device__ Hyperparameters hyperparameters() const {
    return in_memory.float64   ? read_hyperparameters(in_memory.float64, h.maximize)
           : in_memory.float32 ? read_hyperparameters(in_memory.float32, h.maximize)
                               : h;
  }
};

// A tensor's scalars in device memory, read in 16-byte loads.
template <class T>
struct alignas(16) TensorScalars {
  StepScalars<T> scalars;
  uint32_t step;  // after its increment

  __device__ __forceinline__ TensorScalars load() const {
    uint4 words[sizeof(TensorScalars) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(TensorScalars) / 16); ++i)
      words[i] = __ldg(reinterpret_cast<const uint4*>(this) + i);
    TensorScalars loaded;
    memcpy(&loaded, words, sizeof loaded);
    return loaded;
  }
};

// GradScaler's flag: a step that it forbids changes nothing.
__device__ inline bool skipped(const float* found_inf) { return found_inf && *found_inf != 0; }

static_assert(sizeof(StepNumbers) + sizeof(void*) <= OTHER_ARGUMENT_BYTES);

struct StepPointers {
  static constexpr int CAPACITY = (ARGUMENT_BYTES - OTHER_ARGUMENT_BYTES - 16) / static_cast<int>(sizeof(float*));

  float* steps[CAPACITY];
  int32_t count;
};

constexpr int PROLOGUE_THREADS = 32;  // few per CTA: the float64 units of some GPUs are slow, and many SMs share them

template <class T>
__global__ void __launch_bounds__(PROLOGUE_THREADS)
    prologue_kernel(const __grid_constant__ StepPointers pointers, const __grid_constant__ StepNumbers numbers,
                    TensorScalars<T>* scalars) {
  const int i = static_cast<int>(blockIdx.x) * PROLOGUE_THREADS + static_cast<int>(threadIdx.x);
  if (i >= pointers.count || skipped(numbers.found_inf)) return;
  const float step = *pointers.steps[i] + 1;
  *pointers.steps[i] = step;
  scalars[i].scalars = StepScalars<T>(numbers.hyperparameters(), step, numbers.lr.get(), numbers.grad_scale.get());
  scalars[i].step = static_cast<uint32_t>(step);
}

template <class T>
void launch_prologues(cudaStream_t stream, const std::vector<TensorView>& steps, const StepNumbers& numbers,
                      TensorScalars<T>* scalars) {
  for (size_t first = 0; first < steps.size(); first += StepPointers::CAPACITY) {
    StepPointers pointers;
    pointers.count = static_cast<int32_t>(std::min<size_t>(steps.size() - first, StepPointers::CAPACITY));
    for (int32_t i = 0; i < pointers.count; ++i) pointers.steps[i] = static_cast<float*>(steps[first + i].data);
    const auto blocks = static_cast<unsigned int>((pointers.count + PROLOGUE_THREADS - 1) / PROLOGUE_THREADS);
    launch(stream, prologue_kernel<T>, blocks, PROLOGUE_THREADS, pointers, numbers, scalars + first);
  }
}

}  // namespace ademamix

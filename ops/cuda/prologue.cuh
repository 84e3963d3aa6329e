// The first kernel of a step: increments each tensor's step and computes its scalars on the device, so that schedules
// continue when a CUDA graph is replayed.
#pragma once

#include <cstring>

#include "kernel_arguments.h"

namespace ademamix {

template <class T>
__device__ __forceinline__ TensorScalars<T> load(const TensorScalars<T>* scalars) {
  uint4 words[sizeof(TensorScalars<T>) / 16];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof words / 16); ++i)
    words[i] = __ldg(reinterpret_cast<const uint4*>(scalars) + i);
  TensorScalars<T> loaded;
  memcpy(&loaded, words, sizeof loaded);
  return loaded;
}

// Whether GradScaler skips this step, which then changes nothing.
__device__ inline bool skipped(const float* found_inf) { return found_inf && *found_inf != 0; }

template <class T, int CAPACITY, int ROWS>
__global__ void __launch_bounds__(PROLOGUE_THREADS)
    prologue_kernel(const __grid_constant__ StepTable<CAPACITY, ROWS> table,
                    const __grid_constant__ StepNumbers numbers, TensorScalars<T>* scalars) {
  const int i = static_cast<int>(blockIdx.x) * PROLOGUE_THREADS + static_cast<int>(threadIdx.x);
  if (i >= table.count || skipped(numbers.found_inf)) return;
  const float step = next_step(*table.steps[i]);
  *table.steps[i] = step;
  const double factor = grad_factor(numbers.maximize, numbers.grad_scale.get());
  scalars[i].scalars = StepScalars<T>(numbers.hyperparameters(table, i), step, factor);
  scalars[i].step = static_cast<uint32_t>(step);
}

}  // namespace ademamix

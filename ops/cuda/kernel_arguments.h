// The kernels' arguments, for host and device. Lists of tensors are passed by value: one launch updates hundreds of
// tensors, and nothing is copied to the device beforehand, which a captured CUDA graph would replay from host memory
// that is gone by then.
#pragma once

#include <cstdint>

#include "../ademamix.h"
#include "../bfloat16.h"
#include "../blockwise.h"

namespace ademamix {

// The most that a kernel's arguments may take, from driver 530 on (CUDA programming guide, "Function Parameters").
#if !defined(ADEMAMIX_ARGUMENT_BYTES)  // tests take fewer
#define ADEMAMIX_ARGUMENT_BYTES 32764
#endif
constexpr int ARGUMENT_BYTES = ADEMAMIX_ARGUMENT_BYTES;
constexpr int OTHER_ARGUMENT_BYTES = 256;  // kept for a kernel's other arguments
constexpr int TABLE_BYTES = ARGUMENT_BYTES - OTHER_ARGUMENT_BYTES;

constexpr int SHORT_LIST = 16;  // tensors in a small table, which makes a launch cheaper than 32 KB of arguments

// The tensors of one launch. Record is what the kernel needs of a tensor: its pointers and its size. Each tensor has a
// number of tiles, pieces of work for one CTA or warp; tiles are counted through all tensors.
template <class Record, int CAPACITY>
struct TensorTable {
  Record records[CAPACITY];
  uint32_t end_tile[CAPACITY];  // the number of tiles of the tensors up to and including this one
  int32_t count;
  int32_t first;  // the index of the first of the tensors in the call's lists

  struct Position {
    int32_t tensor;
    uint32_t tile;  // of this tensor
  };

  ADEMAMIX_INLINE uint32_t tiles() const { return end_tile[count - 1]; }

  // Finds the tensor that a tile belongs to.
  ADEMAMIX_INLINE Position find(uint32_t tile) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (tile < end_tile[middle])
        high = middle;
      else
        low = middle + 1;
    }
    return {low, low > 0 ? tile - end_tile[low - 1] : tile};
  }
};

template <class Record>
constexpr int LONG_LIST = (TABLE_BYTES - 8) / static_cast<int>(sizeof(Record) + sizeof(uint32_t));

// ----------------------------------------------------------------------------------------------------------- prologue

// A number that the host knows, or one in device memory that is read when the kernel runs.
struct Scalar {
  double value;
  const float* float32;
  const double* float64;

  ADEMAMIX_INLINE double get() const { return float64 ? *float64 : float32 ? *float32 : value; }
};

// A row of hyperparameters in the arguments.
struct HyperparameterRow {
  Hyperparameters numbers;
  Scalar lr;  // replaces numbers.lr

  ADEMAMIX_INLINE Hyperparameters get() const {
    Hyperparameters h = numbers;
    h.lr = lr.get();
    return h;
  }
};

// The tensors of one launch of the prologue: their steps, and their rows of hyperparameters. These are in the
// arguments, unless they are in device memory (StepNumbers).
template <int CAPACITY, int ROWS>
struct StepTable {
  HyperparameterRow hyperparameters[ROWS];
  float* steps[CAPACITY];
  int32_t rows[CAPACITY];  // each tensor's
  int32_t count;
};

// The rows of a launch whose tensors don't all have the same: half of the arguments.
constexpr int MANY_ROWS = TABLE_BYTES / 2 / static_cast<int>(sizeof(HyperparameterRow));

template <int ROWS>
constexpr int LONG_STEP_LIST = (TABLE_BYTES - 8 - ROWS * static_cast<int>(sizeof(HyperparameterRow))) /
                               static_cast<int>(sizeof(float*) + sizeof(int32_t));

// The other numbers that a step's scalars are computed from.
struct StepNumbers {
  const float* float32_rows;  // of hyperparameters in device memory, or null
  const double* float64_rows;
  Scalar grad_scale;
  const float* found_inf;
  bool maximize;

  template <int CAPACITY, int ROWS>
  ADEMAMIX_INLINE Hyperparameters hyperparameters(const StepTable<CAPACITY, ROWS>& table, int32_t i) const {
    const int64_t row = table.rows[i];
    return float64_rows   ? read_hyperparameters(float64_rows + row * HYPERPARAMETERS)
           : float32_rows ? read_hyperparameters(float32_rows + row * HYPERPARAMETERS)
                          : table.hyperparameters[row].get();
  }
};

// A tensor's scalars in device memory, read in 16-byte loads.
template <class T>
struct alignas(16) TensorScalars {
  StepScalars<T> scalars;
  uint32_t step;  // after its increment
};

constexpr int PROLOGUE_THREADS = 32;  // few per CTA: the float64 units of some GPUs are slow, and many SMs share them

// ------------------------------------------------------------------------------------------------------ vector access

// The alignment, in bytes, of the address of `elements` elements that are accessed by up to 16 bytes at a time.
constexpr int access_alignment(int element_bytes, int elements) {
  return element_bytes * elements < 16 ? element_bytes * elements : 16;
}

// ------------------------------------------------------------------------------------------------------- 32-bit step

constexpr int STEP_THREADS = 256;
constexpr int STEP_TILE = 2048;  // elements of one CTA

// Elements that a thread takes at a time: 16 bytes of the narrower of parameter and gradient, except where float64
// parameters would take too many registers.
constexpr int step_width(int param_bytes, int grad_bytes) {
  const int narrower = param_bytes < grad_bytes ? param_bytes : grad_bytes;
  return param_bytes == 8 ? (narrower == 8 ? 2 : 4) : 16 / narrower;
}

// One parameter with its gradient and state, contiguous and of the kernel's dtypes.
struct StepRecord {
  void* param;
  const void* grad;
  void* exp_avg;  // or null
  void* exp_avg_slow;
  void* exp_avg_sq;
  void* remainder;  // if has_remainder(rounding)
  int64_t numel;
  int64_t subsequence;  // of random bits, if draws(rounding)
  int32_t head;         // elements before the first aligned ones; NO_ALIGNMENT if the pointers are never all aligned
  int32_t wide_grad;    // whether the gradient is aligned there too
};

constexpr int NO_ALIGNMENT = -1;

// ----------------------------------------------------------------------------------------------------- blockwise step

constexpr int WARP = 32;
constexpr int LANE_ELEMENTS = BLOCK_SIZE / WARP;
static_assert(LANE_ELEMENTS == RANDOM_GROUP, "a lane draws the bits of its elements at once");

constexpr int BLOCKWISE_THREADS = 128;
constexpr uint32_t TILE_BLOCKS = BLOCKWISE_THREADS / WARP;  // of one tensor, one for each warp

// One parameter with its gradient and quantized state; param and grad are contiguous.
struct BlockwiseRecord {
  void* param;
  const void* grad;
  int8_t* exp_avg;  // or null: there is none, or it is in exp_avg_slow's words
  void* exp_avg_slow;
  uint8_t* exp_avg_sq;  // or null: it is in exp_avg_slow's words
  float* absmaxs[3];    // of exp_avg_slow, exp_avg_sq and exp_avg
  void* remainder;      // if has_remainder(rounding)
  int64_t numel;
  int64_t subsequence;  // of random bits
  uint32_t blocks;
  uint32_t wide_blocks;  // the first blocks, of 256 elements and aligned for vector accesses
  uint32_t wide_grads;   // as many where the gradient is aligned too, else 0
};

}  // namespace ademamix

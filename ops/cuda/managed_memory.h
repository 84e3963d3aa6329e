// CUDA managed memory: it lives on the GPU and moves to the host's memory when the GPU is full.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "device.h"

namespace ademamix {

// All managed memory of the process.
class ManagedMemory {
 public:
  struct Statistics {
    int64_t tensors, bytes;    // there now
    int64_t prefetched_bytes;  // since the start, whether they were on the GPU already or not
  };

  // An allocation, or none: begin is 0.
  struct Block {
    CUdeviceptr begin;
    size_t bytes;
    Gpu* gpu;
    bool paged_out;  // and not fetched since
    pid_t process;   // that has it
  };

  static ManagedMemory& instance();

  void* allocate(size_t bytes, Gpu& gpu);

  // Waits for the kernels that use the memory. Throws nothing: it runs when a tensor dies, in whatever thread. In a
  // forked process, which has no CUDA, only the entry goes.
  void release(void* data);

  Block block_with(const void* data);

  // Whether some of a GPU's managed memory may be on the host: all but full, the GPU may have moved it there.
  bool may_be_moved(const Gpu& gpu);

  // Moves memory to the GPU of a block, in the order of the stream.
  void fetch(const Block& block, CUdeviceptr begin, size_t bytes, CUstream stream);

  // Moves a block to the host, and waits for that; nothing where the driver alone moves memory.
  void page_out(const Block& block, CUstream stream);

  Statistics statistics();

 private:
  std::mutex mutex_;
  std::map<CUdeviceptr, Block> blocks_;  // by their beginnings
  Statistics statistics_{};
};

}  // namespace ademamix

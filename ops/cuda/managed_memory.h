// CUDA managed memory, which the driver moves from the GPU to the host when the GPU is full.
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
    int64_t tensors, bytes;    // that exist now
    int64_t prefetched_bytes;  // since the start, including bytes that were on the GPU already
  };

  // An allocation; begin is 0 if there is none.
  struct Block {
    CUdeviceptr begin;
    size_t bytes;
    Gpu* gpu;
    bool paged_out;  // and not fetched since then
    pid_t process;   // the owner
  };

  static ManagedMemory& instance();

  void* allocate(size_t bytes, Gpu& gpu);

  // Waits for the kernels that use the memory. Doesn't throw, because it runs when a tensor is destroyed, in any
  // thread. In a forked process, which has no CUDA, it only removes the entry.
  void release(void* data);

  Block block_with(const void* data);

  // Whether some of a GPU's managed memory may be on the host: the driver moves it there when the GPU is nearly full.
  bool may_be_moved(const Gpu& gpu);

  // Moves memory to a block's GPU, in stream order.
  void fetch(const Block& block, CUdeviceptr begin, size_t bytes, CUstream stream);

  // Moves a block to the host and waits for that. Does nothing if only the driver can move memory.
  void page_out(const Block& block, CUstream stream);

  Statistics statistics();

 private:
  std::mutex mutex_;
  std::map<CUdeviceptr, Block> blocks_;  // by their first address
  Statistics statistics_{};
};

}  // namespace ademamix

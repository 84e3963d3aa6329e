#include "managed_memory.h"

#include <unistd.h>

namespace ademamix {

constexpr size_t PLENTY_BYTES = size_t{1} << 30;  // if so much is free, nothing was moved to the host

ManagedMemory& ManagedMemory::instance() {
  static ManagedMemory& memory = *new ManagedMemory;  // never destroyed: tensors may outlive static objects
  return memory;
}

void* ManagedMemory::allocate(size_t bytes, Gpu& gpu) {
  const CurrentContext context(gpu);
  const RelaxedCapture relaxed;
  CUdeviceptr begin;
  check_cuda(driver().cuMemAllocManaged(&begin, bytes, CU_MEM_ATTACH_GLOBAL), "managed memory");
  // Only a hint: the memory works without it.
  if (gpu.can_prefetch) driver().cuMemAdvise(begin, bytes, CU_MEM_ADVISE_SET_PREFERRED_LOCATION, gpu.device);
  const std::lock_guard<std::mutex> lock(mutex_);
  blocks_[begin] = {begin, bytes, &gpu, false, getpid()};
  statistics_.tensors += 1;
  statistics_.bytes += static_cast<int64_t>(bytes);
  return reinterpret_cast<void*>(begin);
}

void ManagedMemory::release(void* data) {
  Block block;
  {
    // Erased first: once the memory is freed, another thread may be given the same address.
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = blocks_.find(reinterpret_cast<CUdeviceptr>(data));
    block = entry->second;
    statistics_.tensors -= 1;
    statistics_.bytes -= static_cast<int64_t>(block.bytes);
    blocks_.erase(entry);
  }
  if (block.process != getpid()) return;
  CUcontext popped;
  const bool pushed = driver().cuCtxPushCurrent_v2(block.gpu->context) == CUDA_SUCCESS;  // not at the process' end
  const RelaxedCapture relaxed;
  driver().cuMemFree_v2(block.begin);
  if (pushed) driver().cuCtxPopCurrent_v2(&popped);
}

ManagedMemory::Block ManagedMemory::block_with(const void* data) {
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  const std::lock_guard<std::mutex> lock(mutex_);
  auto entry = blocks_.upper_bound(address);
  if (entry == blocks_.begin()) return {};
  const Block& block = (--entry)->second;
  return address < block.begin + block.bytes ? block : Block{};
}

bool ManagedMemory::may_be_moved(const Gpu& gpu) {
  if (!gpu.can_prefetch) return false;
  bool here = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [begin, block] : blocks_) {
      if (block.gpu != &gpu) continue;
      if (block.paged_out) return true;
      here = true;
    }
  }
  if (!here) return false;
  size_t free, total;
  check_cuda(driver().cuMemGetInfo_v2(&free, &total), "free memory");
  return free < PLENTY_BYTES;
}

void ManagedMemory::fetch(const Block& block, CUdeviceptr begin, size_t bytes, CUstream stream) {
  check_cuda(driver().cuMemPrefetchAsync(begin, bytes, block.gpu->device, stream), "prefetch");
  const std::lock_guard<std::mutex> lock(mutex_);
  statistics_.prefetched_bytes += static_cast<int64_t>(bytes);
  if (const auto entry = blocks_.find(block.begin); entry != blocks_.end()) entry->second.paged_out = false;
}

void ManagedMemory::page_out(const Block& block, CUstream stream) {
  if (!block.gpu->can_prefetch) return;
  check_cuda(driver().cuMemPrefetchAsync(block.begin, block.bytes, CU_DEVICE_CPU, stream), "page out");
  check_cuda(driver().cuStreamSynchronize(stream), "page out");
  const std::lock_guard<std::mutex> lock(mutex_);
  if (const auto entry = blocks_.find(block.begin); entry != blocks_.end()) entry->second.paged_out = true;
}

ManagedMemory::Statistics ManagedMemory::statistics() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return statistics_;
}

}  // namespace ademamix

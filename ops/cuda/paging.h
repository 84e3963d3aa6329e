// State in managed memory: it lives on the GPU and moves to the host's memory when the GPU is full. A step brings what
// has been moved back ahead of the kernels that need it; where it doesn't, the kernels' accesses do, page by page.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "multi_tensor.cuh"
#include "runtime.h"

namespace ademamix {

// All managed memory of the process.
class ManagedMemory {
 public:
  struct Statistics {
    int64_t tensors, bytes;    // there now
    int64_t prefetched_bytes;  // since the start, whether they were on the GPU already or not
  };

  static ManagedMemory& instance() {
    static ManagedMemory& memory = *new ManagedMemory;  // for good: tensors may outlive every static object
    return memory;
  }

  void* allocate(size_t bytes, int device) {
    const RelaxedCapture relaxed;
    void* data;
    check_cuda(cudaMallocManaged(&data, bytes, cudaMemAttachGlobal), "managed memory");
    if (can_prefetch(device)) advise(data, bytes, device);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[data] = bytes;
    statistics_.tensors += 1;
    statistics_.bytes += static_cast<int64_t>(bytes);
    return data;
  }

  // Waits for the kernels that use the memory. Throws nothing: it runs when a tensor dies.
  void release(void* data) {
    const RelaxedCapture relaxed;
    cudaFree(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = sizes_.find(data);
    statistics_.tensors -= 1;
    statistics_.bytes -= static_cast<int64_t>(entry->second);
    sizes_.erase(entry);
  }

  // Whether it lies in an allocation.
  bool has(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto entry = sizes_.upper_bound(data);
    return entry != sizes_.begin() && data < static_cast<const char*>((--entry)->first) + entry->second;
  }

  // The bytes of the allocation that begins there; 0 for other memory.
  size_t size_at(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = sizes_.find(data);
    return entry == sizes_.end() ? 0 : entry->second;
  }

  // Moves memory to the GPU, in the order of the stream.
  void prefetch(const void* data, size_t bytes, int device, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    check_cuda(cudaMemPrefetchAsync(data, bytes, {cudaMemLocationTypeDevice, device}, 0, stream), "prefetch");
#else
    check_cuda(cudaMemPrefetchAsync(data, bytes, device, stream), "prefetch");
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    statistics_.prefetched_bytes += static_cast<int64_t>(bytes);
  }

  // Moves the allocation that begins there to the host, and waits for that.
  void page_out(const void* data, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    check_cuda(cudaMemPrefetchAsync(data, size_at(data), {cudaMemLocationTypeHost, 0}, 0, stream), "page out");
#else
    check_cuda(cudaMemPrefetchAsync(data, size_at(data), cudaCpuDeviceId, stream), "page out");
#endif
    check_cuda(cudaStreamSynchronize(stream), "page out");
  }

  // Not under Windows, for example.
  static bool can_prefetch(int device) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, cudaDevAttrConcurrentManagedAccess, device), "cudaDeviceGetAttribute");
    return value != 0;
  }

  Statistics statistics() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return statistics_;
  }

 private:
  // While another thread captures a graph, memory may be allocated and freed.
  class RelaxedCapture {
   public:
    RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

   private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  };

  static void advise(void* data, size_t bytes, int device) {
#if CUDART_VERSION >= 13000
    const cudaMemLocation location{cudaMemLocationTypeDevice, device};
#else
    const int location = device;
#endif
    check_cuda(cudaMemAdvise(data, bytes, cudaMemAdviseSetPreferredLocation, location), "advice on managed memory");
  }

  std::mutex mutex_;
  std::map<const void*, size_t> sizes_;
  Statistics statistics_{};
};

#if !defined(ADEMAMIX_PREFETCH_BYTES)  // fewer in tests
#define ADEMAMIX_PREFETCH_BYTES (size_t{256} << 20)
#endif
constexpr size_t PREFETCH_BYTES = ADEMAMIX_PREFETCH_BYTES;  // at a time; two of them are wanted on the GPU at once

struct MemoryRange {
  const void* data;
  size_t bytes;
};

// The second stream of a device, on which memory is moved, and the events between it and the computing stream. Steps
// of one device follow one another, also those of several host threads: an event is waited for as it is recorded.
class Prefetcher {
 public:
  static Prefetcher& of(int device) {
    static std::mutex mutex;
    static auto& all = *new std::map<int, std::unique_ptr<Prefetcher>>;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& prefetcher = all[device];
    if (!prefetcher) prefetcher.reset(new Prefetcher(device));
    return *prefetcher;
  }

  std::mutex& in_use() { return in_use_; }

  // Begins to fetch, once the computing stream is where it is now.
  void fetch(const std::vector<MemoryRange>& ranges, cudaStream_t computing) {
    order(computed_, computing, stream_);
    for (const MemoryRange& range : ranges)
      ManagedMemory::instance().prefetch(range.data, range.bytes, device_, stream_);
  }

  // Lets the computing stream wait for what has been fetched.
  void join(cudaStream_t computing) { order(fetched_, stream_, computing); }

 private:
  explicit Prefetcher(int device) : device_(device) {
    check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
    check_cuda(cudaEventCreateWithFlags(&computed_, cudaEventDisableTiming), "event");
    check_cuda(cudaEventCreateWithFlags(&fetched_, cudaEventDisableTiming), "event");
  }

  // What comes in `later` waits for what is in `earlier` now.
  static void order(cudaEvent_t event, cudaStream_t earlier, cudaStream_t later) {
    check_cuda(cudaEventRecord(event, earlier), "event");
    check_cuda(cudaStreamWaitEvent(later, event, 0), "event");
  }

  int device_;
  cudaStream_t stream_;
  cudaEvent_t computed_, fetched_;
  std::mutex in_use_;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

// Calls run(table, tiles) for all records, as for_each_table does. Where their state, which lies where
// state_of(record) says, is in managed memory, in chunks: while one is computed, the next is fetched.
template <class Record, class Tiles, class State, class Run>
void for_each_launch(const CurrentDevice& device, const std::vector<Record>& records, const Tiles& tiles_of,
                     const State& state_of, const Run& run) {
  struct Chunk {
    size_t begin, end;
    std::vector<MemoryRange> ranges;
  };
  auto& memory = ManagedMemory::instance();
  std::vector<Chunk> chunks;
  if (memory.statistics().tensors > 0 && !is_capturing(device.stream()) && memory.can_prefetch(device.index())) {
    size_t bytes = PREFETCH_BYTES;
    for (size_t i = 0; i < records.size(); ++i) {
      if (bytes >= PREFETCH_BYTES) chunks.push_back({i, i, {}}), bytes = 0;
      chunks.back().end = i + 1;
      for (const MemoryRange& range : state_of(records[i]))
        if (range.bytes > 0 && memory.has(range.data)) chunks.back().ranges.push_back(range), bytes += range.bytes;
    }
  }
  if (chunks.empty() || (chunks.size() == 1 && chunks[0].ranges.empty()))
    return for_each_table(records, 0, records.size(), tiles_of, run);

  Prefetcher& prefetcher = Prefetcher::of(device.index());
  const std::lock_guard<std::mutex> lock(prefetcher.in_use());
  prefetcher.fetch(chunks[0].ranges, device.stream());
  for (size_t i = 0; i < chunks.size(); ++i) {
    prefetcher.join(device.stream());
    // The next chunk takes the place of the one before this, which has been computed by then.
    if (i + 1 < chunks.size()) prefetcher.fetch(chunks[i + 1].ranges, device.stream());
    for_each_table(records, chunks[i].begin, chunks[i].end, tiles_of, run);
  }
}

}  // namespace ademamix

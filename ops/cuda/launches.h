// Turns a list of tensors into launches, and fetches paged state ahead of them.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kernel_arguments.h"
#include "managed_memory.h"

namespace ademamix {

struct Range {
  const void* data;
  size_t bytes;
};

// Calls f(table, tiles) for tables of a capacity that together have the records [begin, end); a table without tiles is
// left out.
template <int CAPACITY, class Record, class Tiles, class F>
void for_each_table(const std::vector<Record>& records, size_t begin, size_t end, const Tiles& tiles_of, const F& f) {
  for (size_t first = begin; first < end; first += CAPACITY) {
    TensorTable<Record, CAPACITY> table;
    table.first = static_cast<int32_t>(first);
    table.count = static_cast<int32_t>(std::min<size_t>(end - first, CAPACITY));
    uint32_t tiles = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      table.records[i] = records[first + i];
      table.end_tile[i] = tiles += static_cast<uint32_t>(tiles_of(records[first + i]));
    }
    if (tiles > 0) f(table, tiles);
  }
}

#if !defined(ADEMAMIX_FETCH_BYTES)  // tests take few
#define ADEMAMIX_FETCH_BYTES size_t{256} << 20
#endif
constexpr size_t FETCH_BYTES = ADEMAMIX_FETCH_BYTES;  // fetched at a time; the GPU has two of them at once
constexpr size_t GAP_BYTES = FETCH_BYTES / 128;  // 2 MB, a page: smaller gaps between two pieces are fetched anyway

// A device's second stream, on which memory is moved, and the events between it and the computing stream. The steps of
// a device, also of several host threads, come one after another: each event is waited for as soon as it is recorded.
class Prefetcher {
 public:
  // The managed memory of some tensors, in few pieces that contain little else.
  class Pieces {
   public:
    // Returns how many of the bytes are managed memory.
    size_t add(const Range& range) {
      const auto block = ManagedMemory::instance().block_with(range.data);
      if (block.begin == 0) return 0;
      const auto begin = reinterpret_cast<CUdeviceptr>(range.data), end = begin + range.bytes;
      pieces_.push_back({block, begin, end});
      return range.bytes;
    }

    // To be called after the last add().
    void join() {
      std::sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
      size_t joined = 0;
      for (const Piece& piece : pieces_) {
        Piece* const last = joined > 0 ? &pieces_[joined - 1] : nullptr;
        if (last && last->block.begin == piece.block.begin && piece.begin <= last->end + GAP_BYTES)
          last->end = std::max(last->end, piece.end);
        else
          pieces_[joined++] = piece;
      }
      pieces_.erase(pieces_.begin() + static_cast<int64_t>(joined), pieces_.end());
    }

   private:
    friend Prefetcher;
    struct Piece {
      ManagedMemory::Block block;
      CUdeviceptr begin, end;
    };
    std::vector<Piece> pieces_;
  };

  static Prefetcher& of(const Gpu& gpu) {
    static std::mutex mutex;
    static auto& all = *new std::map<int32_t, std::unique_ptr<Prefetcher>>;
    const std::lock_guard<std::mutex> lock(mutex);
    auto& prefetcher = all[gpu.index];
    if (!prefetcher) prefetcher.reset(new Prefetcher);
    return *prefetcher;
  }

  std::mutex& in_use() { return in_use_; }

  // Starts to fetch when the computing stream has done all its present work.
  void fetch(const Pieces& pieces, CUstream computing) {
    order(computed_, computing, stream_);
    for (const Pieces::Piece& piece : pieces.pieces_)
      ManagedMemory::instance().fetch(piece.block, piece.begin, piece.end - piece.begin, stream_);
  }

  // Makes the computing stream wait until the pieces are fetched.
  void join(CUstream computing) { order(fetched_, stream_, computing); }

 private:
  Prefetcher() {
    check_cuda(driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "stream");
    check_cuda(driver().cuEventCreate(&computed_, CU_EVENT_DISABLE_TIMING), "event");
    check_cuda(driver().cuEventCreate(&fetched_, CU_EVENT_DISABLE_TIMING), "event");
  }

  // Makes later work of the stream `later` wait for the present work of the stream `earlier`.
  static void order(CUevent event, CUstream earlier, CUstream later) {
    check_cuda(driver().cuEventRecord(event, earlier), "event");
    check_cuda(driver().cuStreamWaitEvent(later, event, 0), "event");
  }

  CUstream stream_;
  CUevent computed_, fetched_;
  std::mutex in_use_;
};

// Calls f(table, tiles) for all records. If their state, whose ranges state_of(record) returns, is in managed memory of
// which some may be on the host, this is done in chunks: while one is computed, the next is fetched. Nothing is fetched
// in a captured graph: there, the kernels' accesses move the memory, page by page.
template <class Record, class Tiles, class State, class F>
void for_each_launch(const CurrentDevice& device, const std::vector<Record>& records, const Tiles& tiles_of,
                     const State& state_of, const F& f) {
  const auto run_all = [&](size_t begin, size_t end) {
    if (records.size() <= SHORT_LIST)
      for_each_table<SHORT_LIST>(records, begin, end, tiles_of, f);
    else
      for_each_table<LONG_LIST<Record>>(records, begin, end, tiles_of, f);
  };
  if (!ManagedMemory::instance().may_be_moved(device.gpu()) || is_capturing(device.stream()))
    return run_all(0, records.size());

  struct Chunk {
    size_t begin, end;
    Prefetcher::Pieces pieces;
  };
  std::vector<Chunk> chunks;
  size_t bytes = FETCH_BYTES;
  for (size_t i = 0; i < records.size(); ++i) {
    if (bytes >= FETCH_BYTES) chunks.push_back({i, i, {}}), bytes = 0;
    chunks.back().end = i + 1;
    for (const Range& range : state_of(records[i])) bytes += chunks.back().pieces.add(range);
  }
  for (Chunk& chunk : chunks) chunk.pieces.join();

  Prefetcher& prefetcher = Prefetcher::of(device.gpu());
  const std::lock_guard<std::mutex> lock(prefetcher.in_use());
  prefetcher.fetch(chunks[0].pieces, device.stream());
  for (size_t i = 0; i < chunks.size(); ++i) {
    prefetcher.join(device.stream());
    // The next chunk replaces the one before this, which has been computed by then.
    if (i + 1 < chunks.size()) prefetcher.fetch(chunks[i + 1].pieces, device.stream());
    run_all(chunks[i].begin, chunks[i].end);
  }
}

}  // namespace ademamix

// Lists of tensors as kernel arguments: hundreds of tensors are updated by one launch, and nothing is copied to the
// device beforehand, which a captured CUDA graph would replay from host memory that is gone by then.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ademamix {

// What a kernel's arguments may take (CUDA programming guide, "Function Parameters"): 32 KB from CUDA 12.1 on.
#if CUDART_VERSION >= 12010
constexpr int ARGUMENT_BYTES = 32764;
#else
constexpr int ARGUMENT_BYTES = 4096;
#endif
constexpr int OTHER_ARGUMENT_BYTES = 256;  // kept for a kernel's other arguments

// The tensors of one launch. Record is what the kernel needs of a tensor: its pointers and its size. Each tensor has a
// number of tiles, pieces of work for one CTA or warp; tiles are counted through all tensors.
template <class Record>
struct TensorTable {
  static constexpr int CAPACITY =
      (ARGUMENT_BYTES - OTHER_ARGUMENT_BYTES - 16) / static_cast<int>(sizeof(Record) + sizeof(uint32_t));

  Record records[CAPACITY];
  uint32_t end_tile[CAPACITY];  // the tiles of the tensors up to and with this one
  int32_t count;
  int32_t first;  // of the tensors, its number in the call's lists

  struct Place {
    int32_t tensor;
    uint32_t tile;  // of this tensor
  };

  __device__ uint32_t tiles() const { return end_tile[count - 1]; }

  // The tensor that a tile lies in.
  __device__ Place find(uint32_t tile) const {
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

// Calls run(table, tiles) for tables that together hold the records [begin, end); a table without tiles is left out.
template <class Record, class Tiles, class Run>
void for_each_table(const std::vector<Record>& records, size_t begin, size_t end, const Tiles& tiles_of,
                    const Run& run) {
  using Table = TensorTable<Record>;
  for (size_t first = begin; first < end; first += Table::CAPACITY) {
    Table table;
    table.first = static_cast<int32_t>(first);
    table.count = static_cast<int32_t>(std::min<size_t>(end - first, Table::CAPACITY));
    uint32_t tiles = 0;
    for (int32_t i = 0; i < table.count; ++i) {
      table.records[i] = records[first + i];
      table.end_tile[i] = tiles += static_cast<uint32_t>(tiles_of(records[first + i]));
    }
    if (tiles > 0) run(table, tiles);
  }
}

}  // namespace ademamix

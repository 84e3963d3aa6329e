// Where the state of each parameter is in flat tensors that parameters share, the arenas (torch_ademamix/ops/offsets.py
// has the same for the reference kernels).
#pragma once

#include <vector>

#include "blockwise.h"
#include "view.h"

namespace ademamix {

using Views = std::vector<TensorView>;

// The offsets of one parameter.
struct StateOffsets {
  size_t arena;   // its index in each list of state
  int64_t first;  // the first of the parameter's elements in that arena; a multiple of BLOCK_SIZE
  int64_t step;   // the parameter's element in that arena of steps
};

constexpr size_t OFFSETS_PER_PARAM = 3;  // in an op's list of offsets

inline std::vector<StateOffsets> read_offsets(const std::vector<int64_t>& numbers) {
  std::vector<StateOffsets> offsets;
  offsets.reserve(numbers.size() / OFFSETS_PER_PARAM);
  for (size_t i = 0; i < numbers.size(); i += OFFSETS_PER_PARAM)
    offsets.push_back({static_cast<size_t>(numbers[i]), numbers[i + 1], numbers[i + 2]});
  return offsets;
}

inline size_t state_element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Short: return 2;
    default: return 1;
  }
}

// Returns a view of an arena for each parameter: of the parameter's shape, in row-major order, from the element
// offset_of(offsets) on.
template <class OffsetOf>
Views row_major_views(const Views& arenas, const Views& params, const std::vector<StateOffsets>& offsets,
                      const OffsetOf& offset_of) {
  if (arenas.empty()) return {};
  const auto size = static_cast<int64_t>(state_element_size(arenas[0].dtype));
  Views views = params;
  for (size_t i = 0; i < views.size(); ++i) {
    const TensorView& arena = arenas[offsets[i].arena];
    views[i].data = static_cast<char*>(arena.data) + offset_of(offsets[i]) * size;
    views[i].dtype = arena.dtype;
    views[i].contiguous = true;
    views[i].strides = nullptr;  // not the parameter's
  }
  return views;
}

// Codes are in row-major order, in which blocks are counted.
inline Views code_views(const Views& arenas, const Views& params, const std::vector<StateOffsets>& offsets) {
  return row_major_views(arenas, params, offsets, [](const StateOffsets& o) { return o.first; });
}

// These views have the shape of the parameters, although there is only one scale per block.
inline Views absmax_views(const Views& arenas, const Views& params, const std::vector<StateOffsets>& offsets) {
  return row_major_views(arenas, params, offsets, [](const StateOffsets& o) { return o.first / BLOCK_SIZE; });
}

inline Views step_views(const Views& arenas, const Views& params, const std::vector<StateOffsets>& offsets) {
  return row_major_views(arenas, params, offsets, [](const StateOffsets& o) { return o.step; });
}

// Unquantized state is in the parameter's own order in memory, if that has no gaps, else in row-major order.
inline Views state_views(const Views& arenas, const Views& params, const std::vector<StateOffsets>& offsets) {
  Views views = code_views(arenas, params, offsets);
  for (size_t i = 0; i < views.size(); ++i) {
    if (!fills_memory(params[i])) continue;
    views[i].strides = params[i].strides;
    views[i].contiguous = params[i].contiguous;
  }
  return views;
}

}  // namespace ademamix

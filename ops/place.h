// The parts of flat tensors of state, the arenas, that belong to the parameters (torch_ademamix/ops/offsets.py has the
// same for the reference kernels).
#pragma once

#include <vector>

#include "blockwise.h"
#include "view.h"

namespace ademamix {

using Views = std::vector<TensorView>;

// One parameter's.
struct Place {
  size_t arena;
  int64_t first;  // of the arena's elements; a multiple of BLOCK_SIZE
  int64_t step;   // the element of the arena of steps
};

constexpr size_t PLACE_NUMBERS = 3;  // in an op's argument `places`, for each parameter

inline std::vector<Place> places_of(const std::vector<int64_t>& numbers) {
  std::vector<Place> places;
  places.reserve(numbers.size() / PLACE_NUMBERS);
  for (size_t i = 0; i < numbers.size(); i += PLACE_NUMBERS)
    places.push_back({static_cast<size_t>(numbers[i]), numbers[i + 1], numbers[i + 2]});
  return places;
}

inline size_t state_element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::Short: return 2;
    default: return 1;
  }
}

// Of one list of arenas, where `first` gives a place's element: views of the parameters' shapes, in row-major order.
template <class First>
Views row_major_parts(const Views& arenas, const Views& params, const std::vector<Place>& places, const First& first) {
  if (arenas.empty()) return {};
  const auto size = static_cast<int64_t>(state_element_size(arenas[0].dtype));
  Views parts = params;
  for (size_t i = 0; i < parts.size(); ++i) {
    const TensorView& arena = arenas[places[i].arena];
    parts[i].data = static_cast<char*>(arena.data) + first(places[i]) * size;
    parts[i].dtype = arena.dtype;
    parts[i].contiguous = true;
    parts[i].strides = nullptr;  // not the parameter's
  }
  return parts;
}

// In row-major order, as blocks are counted.
inline Views code_parts(const Views& arenas, const Views& params, const std::vector<Place>& places) {
  return row_major_parts(arenas, params, places, [](const Place& place) { return place.first; });
}

// Of the shape that the codes have.
inline Views absmax_parts(const Views& arenas, const Views& params, const std::vector<Place>& places) {
  return row_major_parts(arenas, params, places, [](const Place& place) { return place.first / BLOCK_SIZE; });
}

inline Views step_parts(const Views& arenas, const Views& params, const std::vector<Place>& places) {
  return row_major_parts(arenas, params, places, [](const Place& place) { return place.step; });
}

// In a parameter's own order in memory, if it has no gaps there, else in row-major order.
inline Views state_parts(const Views& arenas, const Views& params, const std::vector<Place>& places) {
  Views parts = code_parts(arenas, params, places);
  for (size_t i = 0; i < parts.size(); ++i) {
    if (!fills_memory(params[i])) continue;
    parts[i].strides = params[i].strides;
    parts[i].contiguous = params[i].contiguous;
  }
  return parts;
}

}  // namespace ademamix

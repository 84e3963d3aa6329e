// Shares a list of tensors out among torch's threads, by elements: one large tensor and four hundred small ones are
// both spread evenly.
#pragma once

#include <algorithm>
#include <vector>

#include "../torch_stable.h"

namespace ademamix {

constexpr int64_t UNIT = 256;     // elements of one tensor that no two threads share; a quantization block
constexpr int64_t GRAIN = 32768;  // elements that are worth a thread of their own

// Calls f(tensor, begin, end) over ranges of elements that cover all tensors; f runs on several threads.
template <class F>
void parallel_over_elements(const std::vector<int64_t>& numels, const F& f) {
  std::vector<int64_t> first_unit(numels.size() + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    first_unit[i + 1] = first_unit[i] + (numels[i] + UNIT - 1) / UNIT;
    elements += numels[i];
  }
  const int64_t units = first_unit.back();
  const int64_t grain = units * GRAIN / std::max<int64_t>(elements, 1);  // hundreds of tiny tensors fit in one
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first_unit[i + 1]);
      if (begin < stop) f(i, (begin - first_unit[i]) * UNIT, std::min((stop - first_unit[i]) * UNIT, numels[i]));
      begin = std::max(begin, stop);
    }
  });
}

}  // namespace ademamix

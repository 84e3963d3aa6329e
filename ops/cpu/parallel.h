// Divides a list of tensors among torch's threads by elements, so that one large tensor and four hundred small ones are
// both spread evenly.
#pragma once

#include <algorithm>
#include <vector>

#include "../torch_stable.h"

#include "../blockwise.h"

namespace ademamix {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread of their own

// Calls f(tensor, begin, end) over ranges of elements that cover all tensors; f runs on several threads. `begin` is a
// multiple of BLOCK_SIZE, so no two threads share a quantization block.
template <class F>
void parallel_over_elements(const std::vector<int64_t>& numels, const F& f) {
  std::vector<int64_t> first_block(numels.size() + 1, 0);
  int64_t elements = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    first_block[i + 1] = first_block[i] + block_count(numels[i]);
    elements += numels[i];
  }
  const int64_t blocks = first_block.back();
  const int64_t grain = blocks * GRAIN / std::max<int64_t>(elements, 1);  // hundreds of tiny tensors fit in one
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(first_block.begin(), first_block.end(), begin) - first_block.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, first_block[i + 1]);
      if (begin < stop)
        f(i, (begin - first_block[i]) * BLOCK_SIZE, std::min((stop - first_block[i]) * BLOCK_SIZE, numels[i]));
      begin = std::max(begin, stop);
    }
  });
}

}  // namespace ademamix

// Random bits for whole blocks, many groups at a time.
#pragma once

#include "../blockwise.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace ademamix {

// A word of several groups, each in the lower half of a lane; in the upper half is garbage. Compilers don't find the
// instruction that multiplies lower halves, and multiply whole lanes in its place.
#if defined(CPU_CAPABILITY_AVX512)
typedef uint64_t WideWords __attribute__((vector_size(64)));
ADEMAMIX_INLINE WideWords wide_product(WideWords a, WideWords b) {
  return reinterpret_cast<WideWords>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(CPU_CAPABILITY_AVX2)
typedef uint64_t WideWords __attribute__((vector_size(32)));
ADEMAMIX_INLINE WideWords wide_product(WideWords a, WideWords b) {
  return reinterpret_cast<WideWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#else
using WideWords = uint64_t;
ADEMAMIX_INLINE WideWords wide_product(WideWords a, WideWords b) { return (a & UINT32_MAX) * (b & UINT32_MAX); }
#endif

// random_words for the groups of a block, from the group `first` on, as the bits of its elements.
inline void random_block(const RandomKey& key, uint64_t first, uint16_t (&random)[BLOCK_SIZE]) {
  constexpr int GROUPS = BLOCK_SIZE / RANDOM_GROUP, LANES = sizeof(WideWords) / sizeof(uint64_t);
  constexpr int CHAINS = LANES == 8 ? 4 : 2;  // as many as the registers hold
  const WideWords zero{}, multiplier0 = zero + PHILOX_MULTIPLIER[0], multiplier1 = zero + PHILOX_MULTIPLIER[1];
  uint64_t group[GROUPS], low[GROUPS], high[GROUPS];
  for (int i = 0; i < GROUPS; ++i) group[i] = first + key.first_group + static_cast<uint64_t>(i);
  for (int begin = 0; begin < GROUPS; begin += CHAINS * LANES) {
    WideWords c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int i = 0; i < CHAINS; ++i) {
      std::memcpy(&c0[i], group + begin + i * LANES, sizeof(WideWords));
      c1[i] = c0[i] >> 32;
      c2[i] = zero + key.step;
      c3[i] = zero + key.stream;
    }
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
      for (int i = 0; i < CHAINS; ++i) {
        const WideWords product0 = wide_product(multiplier0, c0[i]), product1 = wide_product(multiplier1, c2[i]);
        c0[i] = (product1 >> 32) ^ c1[i] ^ key0;
        c1[i] = product1;
        c2[i] = (product0 >> 32) ^ c3[i] ^ key1;
        c3[i] = product0;
      }
      key0 += PHILOX_KEY_STEP[0];
      key1 += PHILOX_KEY_STEP[1];
    }
    for (int i = 0; i < CHAINS; ++i) {
      const WideWords pair0 = (c0[i] & UINT32_MAX) | (c1[i] << 32), pair1 = (c2[i] & UINT32_MAX) | (c3[i] << 32);
      std::memcpy(low + begin + i * LANES, &pair0, sizeof(WideWords));
      std::memcpy(high + begin + i * LANES, &pair1, sizeof(WideWords));
    }
  }
  for (int i = 0; i < GROUPS; ++i) {
    std::memcpy(random + RANDOM_GROUP * i, low + i, sizeof(uint64_t));
    std::memcpy(random + RANDOM_GROUP * i + 4, high + i, sizeof(uint64_t));
  }
}

}  // namespace ademamix

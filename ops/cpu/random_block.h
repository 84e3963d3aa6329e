// Random bits for whole blocks, many groups at a time.
#pragma once

#include "../blockwise.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ademamix {

// One word of several groups, and the halves of the product of two. Compilers don't find the instructions that multiply
// 32 bits to 64, and multiply whole lanes instead.
#if defined(__aarch64__)

typedef uint32_t Words __attribute__((vector_size(16)));

ADEMAMIX_INLINE void multiply(Words a, Words b, Words& low, Words& high) {
  const auto x = reinterpret_cast<uint32x4_t>(a), y = reinterpret_cast<uint32x4_t>(b);
  const auto lower = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
  const auto upper = vreinterpretq_u32_u64(vmull_high_u32(x, y));
  low = reinterpret_cast<Words>(vuzp1q_u32(lower, upper));
  high = reinterpret_cast<Words>(vuzp2q_u32(lower, upper));
}

#else  // each word is in the lower half of a lane; the upper half is garbage

#if defined(CPU_CAPABILITY_AVX512)
typedef uint64_t Words __attribute__((vector_size(64)));
ADEMAMIX_INLINE Words wide_product(Words a, Words b) {
  return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
#elif defined(CPU_CAPABILITY_AVX2)
typedef uint64_t Words __attribute__((vector_size(32)));
ADEMAMIX_INLINE Words wide_product(Words a, Words b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
#else
using Words = uint64_t;
ADEMAMIX_INLINE Words wide_product(Words a, Words b) { return (a & UINT32_MAX) * (b & UINT32_MAX); }
#endif

ADEMAMIX_INLINE void multiply(Words a, Words b, Words& low, Words& high) {
  low = wide_product(a, b);
  high = low >> 32;
}

#endif

// Does the rounds of random_words for the groups of CHAINS vectors of each word.
template <int CHAINS>
ADEMAMIX_INLINE void philox(const RandomKey& key, Words (&c0)[CHAINS], Words (&c1)[CHAINS], Words (&c2)[CHAINS],
                            Words (&c3)[CHAINS]) {
  const Words zero{}, multiplier0 = zero + PHILOX_MULTIPLIER[0], multiplier1 = zero + PHILOX_MULTIPLIER[1];
  for (int i = 0; i < CHAINS; ++i) {
    c2[i] = zero + key.step;
    c3[i] = zero + key.subsequence;
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < PHILOX_ROUNDS; ++round) {
    for (int i = 0; i < CHAINS; ++i) {
      Words low0, high0, low1, high1;
      multiply(multiplier0, c0[i], low0, high0);
      multiply(multiplier1, c2[i], low1, high1);
      c0[i] = high1 ^ c1[i] ^ key0;
      c1[i] = low1;
      c2[i] = high0 ^ c3[i] ^ key1;
      c3[i] = low0;
    }
    key0 += PHILOX_KEY_STEP[0];
    key1 += PHILOX_KEY_STEP[1];
  }
}

// Computes the random bits of a block's elements: random_words for its groups, from group `first` on.
inline void random_block(const RandomKey& key, uint64_t first, uint16_t (&random)[BLOCK_SIZE]) {
  constexpr int GROUPS = BLOCK_SIZE / RANDOM_GROUP;
  uint64_t group[GROUPS];
  for (int i = 0; i < GROUPS; ++i) group[i] = first + key.first_group + static_cast<uint64_t>(i);
#if defined(__aarch64__)
  constexpr int LANES = sizeof(Words) / sizeof(uint32_t), CHAINS = 4;
  for (int begin = 0; begin < GROUPS; begin += CHAINS * LANES) {
    Words c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int i = 0; i < CHAINS; ++i) {
      const uint32x4x2_t halves = vld2q_u32(reinterpret_cast<const uint32_t*>(group + begin + i * LANES));
      c0[i] = reinterpret_cast<Words>(halves.val[0]);
      c1[i] = reinterpret_cast<Words>(halves.val[1]);
    }
    philox(key, c0, c1, c2, c3);
    for (int i = 0; i < CHAINS; ++i) {
      const uint32x4x4_t words{reinterpret_cast<uint32x4_t>(c0[i]), reinterpret_cast<uint32x4_t>(c1[i]),
                               reinterpret_cast<uint32x4_t>(c2[i]), reinterpret_cast<uint32x4_t>(c3[i])};
      vst4q_u32(reinterpret_cast<uint32_t*>(random + (begin + i * LANES) * RANDOM_GROUP), words);
    }
  }
#else
  constexpr int LANES = sizeof(Words) / sizeof(uint64_t);
  constexpr int CHAINS = LANES == 8 ? 4 : 2;  // as many as the registers hold
  uint64_t low[GROUPS], high[GROUPS];
  for (int begin = 0; begin < GROUPS; begin += CHAINS * LANES) {
    Words c0[CHAINS], c1[CHAINS], c2[CHAINS], c3[CHAINS];
    for (int i = 0; i < CHAINS; ++i) {
      std::memcpy(&c0[i], group + begin + i * LANES, sizeof(Words));
      c1[i] = c0[i] >> 32;
    }
    philox(key, c0, c1, c2, c3);
    for (int i = 0; i < CHAINS; ++i) {
      const Words pair0 = (c0[i] & UINT32_MAX) | (c1[i] << 32), pair1 = (c2[i] & UINT32_MAX) | (c3[i] << 32);
      std::memcpy(low + begin + i * LANES, &pair0, sizeof(Words));
      std::memcpy(high + begin + i * LANES, &pair1, sizeof(Words));
    }
  }
  for (int i = 0; i < GROUPS; ++i) {
    std::memcpy(random + RANDOM_GROUP * i, low + i, sizeof(uint64_t));
    std::memcpy(random + RANDOM_GROUP * i + 4, high + i, sizeof(uint64_t));
  }
#endif
}

}  // namespace ademamix

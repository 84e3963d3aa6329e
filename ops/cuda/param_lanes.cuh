// N elements of a parameter in registers, read and rounded in one of the ways of ../bfloat16.h.
#pragma once

#include "../bfloat16.h"
#include "lanes.cuh"

namespace ademamix {

template <ParamRounding ROUNDING>
using Remainder = std::conditional_t<ROUNDING == ParamRounding::REMAINDER8, int8_t, int16_t>;

// Returns the address of element i's remainder, or null if there are no remainders.
template <ParamRounding ROUNDING>
__device__ __forceinline__ Remainder<ROUNDING>* remainder_at(void* remainders, int64_t i) {
  return has_remainder(ROUNDING) ? static_cast<Remainder<ROUNDING>*>(remainders) + i : nullptr;
}

template <class Remainder>
__device__ __forceinline__ float join(uint32_t param, Remainder remainder) {
  return join_weight(param, sizeof(Remainder) == 1 ? remainder * REMAINDER8_SCALE : remainder);
}

template <class P, ParamRounding ROUNDING, int N>
class ParamLanes {
  static_assert(ROUNDING == ParamRounding::NEAREST || std::is_same_v<P, bfloat16>);

 public:
  __device__ __forceinline__ void load(const P* param, const Remainder<ROUNDING>* remainder) {
    param_.load(param);
    if constexpr (has_remainder(ROUNDING)) remainder_.load(remainder);
  }

  // The first `count` elements; the others become 0.
  __device__ __forceinline__ void load(const P* param, const Remainder<ROUNDING>* remainder, int count) {
    param_.load(param, count, P(0));
    if constexpr (has_remainder(ROUNDING)) remainder_.load(remainder, count, 0);
  }

  __device__ __forceinline__ void store(P* param, Remainder<ROUNDING>* remainder) const {
    param_.store(param);
    if constexpr (has_remainder(ROUNDING)) remainder_.store(remainder);
  }

  __device__ __forceinline__ void store(P* param, Remainder<ROUNDING>* remainder, int count) const {
    param_.store(param, count);
    if constexpr (has_remainder(ROUNDING)) remainder_.store(remainder, count);
  }

  template <class T>
  __device__ __forceinline__ T get(int i) const {
    if constexpr (has_remainder(ROUNDING))
      return join(float_bits(param_.template get<float>(i)) >> 16, remainder_.template get<Remainder<ROUNDING>>(i));
    else
      return param_.template get<T>(i);
  }

  // `group` is the index of the group that these elements are, for random bits.
  template <class T>
  __device__ __forceinline__ void set_all(const T (&weights)[N], const RandomKey& key, uint64_t group) {
    if constexpr (ROUNDING == ParamRounding::NEAREST) {
      param_.set_all(weights);
    } else if constexpr (has_remainder(ROUNDING)) {
      RandomWords words{};
      if constexpr (draws(ROUNDING)) words = random_words(key, group, FIRST_PARAM_GROUP);
      uint32_t params[N], remainders[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const SplitWeight weight =
            split_weight(draws(ROUNDING) ? round_to_24_bits(weights[i], random_half(words, i)) : weights[i]);
        params[i] = weight.param;
        remainders[i] = weight.remainder;
      }
      param_.set_upper_halves(params);
      remainder_.template set_all<draws(ROUNDING) ? 8 : 0>(remainders);
    } else {
      static_assert(N == RANDOM_GROUP);
      const RandomWords words = random_words(key, group, FIRST_PARAM_GROUP);
      uint32_t params[N];
#pragma unroll
      for (int i = 0; i < N; ++i) params[i] = round_stochastically(weights[i], random_half(words, i));
      param_.set_upper_halves(params);
    }
  }

 private:
  Lanes<P, N> param_;
  std::conditional_t<has_remainder(ROUNDING), Lanes<Remainder<ROUNDING>, N>, Nothing> remainder_;
};

// Loads one element, for those that vectors don't cover.
template <ParamRounding ROUNDING, class T, class P>
__device__ __forceinline__ T load_weight(const P* param, const Remainder<ROUNDING>* remainder) {
  if constexpr (has_remainder(ROUNDING))
    return join(param->x, *remainder);
  else
    return static_cast<T>(*param);
}

// Returns the random bits of one element.
__device__ __forceinline__ uint32_t param_random(const RandomKey& key, int64_t element) {
  const RandomWords words = random_words(key, static_cast<uint64_t>(element) / RANDOM_GROUP, FIRST_PARAM_GROUP);
  const int i = static_cast<int>(element % RANDOM_GROUP);
  // Comparisons, because an array that is indexed by a variable would have to be in memory.
  const uint32_t word = i < 4 ? (i < 2 ? words.word[0] : words.word[1]) : i < 6 ? words.word[2] : words.word[3];
  return i % 2 ? word >> 16 : word & 0xffff;
}

// Stores one element, in the same way; `element` is its index.
template <ParamRounding ROUNDING, class T, class P>
__device__ __forceinline__ void store_weight(T weight, P* param, Remainder<ROUNDING>* remainder, const RandomKey& key,
                                             int64_t element) {
  if constexpr (ROUNDING == ParamRounding::NEAREST) {
    *param = static_cast<P>(weight);
  } else if constexpr (has_remainder(ROUNDING)) {
    const SplitWeight split =
        split_weight(draws(ROUNDING) ? round_to_24_bits(weight, param_random(key, element)) : weight);
    param->x = static_cast<uint16_t>(split.param >> 16);
    *remainder = static_cast<Remainder<ROUNDING>>(split.remainder >> (draws(ROUNDING) ? 8 : 0));
  } else {
    param->x = static_cast<uint16_t>(round_stochastically(weight, param_random(key, element)) >> 16);
  }
}

}  // namespace ademamix

// N elements of a parameter in registers, read and rounded in one of the ways of ../bfloat16.h.
#pragma once

#include "../bfloat16.h"
#include "lanes.cuh"

namespace ademamix {

// Element i's, or nothing where there are no remainders to count from.
template <ParamRounding ROUNDING>
__device__ __forceinline__ int16_t* remainder_at(int16_t* remainders, int64_t i) {
  return ROUNDING == ParamRounding::REMAINDER ? remainders + i : nullptr;
}

template <class P, ParamRounding ROUNDING, int N>
class ParamLanes {
  static_assert(ROUNDING == ParamRounding::NEAREST || std::is_same_v<P, bfloat16>);

 public:
  __device__ __forceinline__ void load(const P* param, const int16_t* remainder) {
    param_.load(param);
    if constexpr (ROUNDING == ParamRounding::REMAINDER) remainder_.load(remainder);
  }

  // The first `count` elements; the others become 0.
  __device__ __forceinline__ void load(const P* param, const int16_t* remainder, int count) {
    param_.load(param, count, P(0));
    if constexpr (ROUNDING == ParamRounding::REMAINDER) remainder_.load(remainder, count, 0);
  }

  __device__ __forceinline__ void store(P* param, int16_t* remainder) const {
    param_.store(param);
    if constexpr (ROUNDING == ParamRounding::REMAINDER) remainder_.store(remainder);
  }

  __device__ __forceinline__ void store(P* param, int16_t* remainder, int count) const {
    param_.store(param, count);
    if constexpr (ROUNDING == ParamRounding::REMAINDER) remainder_.store(remainder, count);
  }

  template <class T>
  __device__ __forceinline__ T get(int i) const {
    if constexpr (ROUNDING == ParamRounding::REMAINDER)
      return join_weight(float_bits(param_.template get<float>(i)) >> 16, remainder_.template get<int16_t>(i));
    else
      return param_.template get<T>(i);
  }

  // `group` is the number of the group of elements that these are, for random bits.
  template <class T>
  __device__ __forceinline__ void set_all(const T (&weights)[N], const RandomKey& key, uint64_t group) {
    if constexpr (ROUNDING == ParamRounding::NEAREST) {
      param_.set_all(weights);
    } else if constexpr (ROUNDING == ParamRounding::REMAINDER) {
      uint32_t params[N], remainders[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const SplitWeight weight = split_weight(weights[i]);
        params[i] = weight.param;
        remainders[i] = weight.remainder;
      }
      param_.set_upper_halves(params);
      remainder_.set_all(remainders);
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
  std::conditional_t<ROUNDING == ParamRounding::REMAINDER, Lanes<int16_t, N>, Nothing> remainder_;
};

// One element, where vectors don't fit.
template <ParamRounding ROUNDING, class T, class P>
__device__ __forceinline__ T load_weight(const P* param, const int16_t* remainder) {
  if constexpr (ROUNDING == ParamRounding::REMAINDER)
    return join_weight(param->x, *remainder);
  else
    return static_cast<T>(*param);
}

// `number` is the element's.
template <ParamRounding ROUNDING, class T, class P>
__device__ __forceinline__ void store_weight(T weight, P* param, int16_t* remainder, const RandomKey& key,
                                             int64_t number) {
  if constexpr (ROUNDING == ParamRounding::NEAREST) {
    *param = static_cast<P>(weight);
  } else if constexpr (ROUNDING == ParamRounding::REMAINDER) {
    const SplitWeight split = split_weight(weight);
    param->x = static_cast<uint16_t>(split.param >> 16);
    *remainder = static_cast<int16_t>(split.remainder);
  } else {
    const RandomWords words = random_words(key, static_cast<uint64_t>(number) / RANDOM_GROUP, FIRST_PARAM_GROUP);
    const int i = static_cast<int>(number % RANDOM_GROUP);
    // By comparisons: an array that is indexed by a variable would have to lie in memory.
    const uint32_t word = i < 4 ? (i < 2 ? words.word[0] : words.word[1]) : i < 6 ? words.word[2] : words.word[3];
    param->x = static_cast<uint16_t>(round_stochastically(weight, i % 2 ? word >> 16 : word & 0xffff) >> 16);
  }
}

}  // namespace ademamix

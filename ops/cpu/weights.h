// A chunk of parameters as the unrounded weights, in the type T of the arithmetic (../bfloat16.h).
#pragma once

#include "chunk.h"
#include "kernels.h"
#include "random_block.h"

namespace ademamix {

template <class T>
class Weights {
 public:
  // `begin` is a multiple of BLOCK_SIZE.
  Weights(const Param& param, int64_t begin, int64_t n)
      : chunk_(param.tensor, begin, n), param_(param), begin_(begin), n_(n) {
    if constexpr (std::is_same_v<T, float>) {
      if (param.rounding == ParamRounding::REMAINDER) join<int16_t, 1>();
      if (param.rounding == ParamRounding::REMAINDER8) join<int8_t, REMAINDER8_SCALE>();
    }
  }

  T* data() { return chunk_.data(); }

  void write_back() {
    if constexpr (std::is_same_v<T, float>) {
      if (param_.rounding == ParamRounding::REMAINDER) split<int16_t, 1>();
      if (param_.rounding == ParamRounding::REMAINDER8) {
        round([](float weight, uint32_t random) { return round_to_24_bits(weight, random); });
        split<int8_t, REMAINDER8_SCALE>();
      }
      if (param_.rounding == ParamRounding::STOCHASTIC)
        round([](float weight, uint32_t random) {
          return float_from_bits(round_stochastically(weight, random) & 0xffff0000);
        });
    }
    chunk_.write_back();
  }

 private:
  // Calls f(i, remainder) for the chunk's elements.
  template <class Remainder, class F>
  void for_each_remainder(const F& f) {
    auto* remainder = static_cast<Remainder*>(param_.remainder.data);
    if (!param_.remainder.contiguous)
      return for_each_offset(param_.remainder, begin_, n_, [&](int64_t i, int64_t offset) { f(i, remainder[offset]); });
    for (int64_t i = 0; i < n_; ++i) f(i, remainder[begin_ + i]);
  }

  template <class Remainder, int SCALE>
  void join() {
    float* data = chunk_.data();
    for_each_remainder<Remainder>([&](int64_t i, const Remainder& remainder) {
      data[i] = join_weight(float_bits(data[i]) >> 16, remainder * SCALE);
    });
  }

  template <class Remainder, int SCALE>
  void split() {
    float* data = chunk_.data();
    for_each_remainder<Remainder>([&](int64_t i, Remainder& remainder) {
      const SplitWeight weight = split_weight(data[i]);
      remainder = static_cast<Remainder>(static_cast<int16_t>(weight.remainder) / SCALE);
      data[i] = float_from_bits(weight.param & 0xffff0000);
    });
  }

  template <class F>
  void round(const F& rounded) {
    float* data = chunk_.data();
    static_assert(CHUNK <= BLOCK_SIZE);
    uint16_t random[BLOCK_SIZE];
    random_block(param_.random, FIRST_PARAM_GROUP + static_cast<uint64_t>(begin_) / RANDOM_GROUP, random);
    for (int64_t i = 0; i < n_; ++i) data[i] = rounded(data[i], random[i]);
  }

  Chunk<T> chunk_;
  const Param& param_;
  int64_t begin_, n_;
};

}  // namespace ademamix

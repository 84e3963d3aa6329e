// A run of parameters in the type T of the arithmetic, as they are before and after rounding (../bfloat16.h).
#pragma once

#include "param.h"
#include "random_block.h"
#include "staging.h"

namespace ademamix {

template <class T>
class Weights {
 public:
  // `begin` is a multiple of BLOCK_SIZE.
  Weights(const Param& param, int64_t begin, int64_t n)
      : run_(param.tensor, begin, n), param_(param), begin_(begin), n_(n) {
    if constexpr (std::is_same_v<T, float>) {
      if (param.rounding == ParamRounding::REMAINDER) join<int16_t, 1>();
      if (param.rounding == ParamRounding::REMAINDER8) join<int8_t, REMAINDER8_UNIT>();
    }
  }

  T* data() { return run_.data(); }

  void write_back() {
    if constexpr (std::is_same_v<T, float>) {
      if (param_.rounding == ParamRounding::REMAINDER) split<int16_t, 1>();
      if (param_.rounding == ParamRounding::REMAINDER8) {
        round([](float weight, uint32_t random) { return round_to_24_bits(weight, random); });
        split<int8_t, REMAINDER8_UNIT>();
      }
      if (param_.rounding == ParamRounding::STOCHASTIC)
        round([](float weight, uint32_t random) {
          return float_from_bits(round_stochastically(weight, random) & 0xffff0000);
        });
    }
    run_.write_back();
  }

 private:
  // Calls f(i, remainder) for the run's elements.
  template <class Remainder, class F>
  void for_each_remainder(const F& f) {
    auto* remainder = static_cast<Remainder*>(param_.remainder.data);
    if (!param_.remainder.contiguous)
      return for_each_offset(param_.remainder, begin_, n_, [&](int64_t i, int64_t offset) { f(i, remainder[offset]); });
    for (int64_t i = 0; i < n_; ++i) f(i, remainder[begin_ + i]);
  }

  template <class Remainder, int UNIT>
  void join() {
    float* data = run_.data();
    for_each_remainder<Remainder>([&](int64_t i, const Remainder& remainder) {
      data[i] = join_weight(float_bits(data[i]) >> 16, remainder * UNIT);
    });
  }

  template <class Remainder, int UNIT>
  void split() {
    float* data = run_.data();
    for_each_remainder<Remainder>([&](int64_t i, Remainder& remainder) {
      const SplitWeight weight = split_weight(data[i]);
      remainder = static_cast<Remainder>(static_cast<int16_t>(weight.remainder) / UNIT);
      data[i] = float_from_bits(weight.param & 0xffff0000);
    });
  }

  template <class F>
  void round(const F& rounded) {
    float* data = run_.data();
    static_assert(RUN <= BLOCK_SIZE);
    uint16_t random[BLOCK_SIZE];
    random_block(param_.random, FIRST_PARAM_GROUP + static_cast<uint64_t>(begin_) / RANDOM_GROUP, random);
    for (int64_t i = 0; i < n_; ++i) data[i] = rounded(data[i], random[i]);
  }

  Run<T> run_;
  const Param& param_;
  int64_t begin_, n_;
};

}  // namespace ademamix

// N elements of a tensor, read and written by one thread in accesses of up to 16 bytes. They stay as they lie in
// memory until they are used, so that all of a thread's loads are under way before the first conversion.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../value.h"

namespace ademamix {

template <class S, int N>
class Lanes {
  static constexpr int BYTES = N * static_cast<int>(sizeof(S));
  using Word = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

 public:
  static constexpr int ALIGNMENT = BYTES < 16 ? BYTES : 16;

  // p is a multiple of ALIGNMENT.
  __device__ __forceinline__ void load(const S* p) {
    if constexpr (BYTES < 16) {
      static_assert(BYTES == sizeof words_ && (BYTES == 4 || BYTES == 8));
      using Access = std::conditional_t<BYTES == 4, uint32_t, uint2>;
      const Access v = *reinterpret_cast<const Access*>(p);
      memcpy(words_, &v, BYTES);
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        if constexpr (sizeof(Word) == 8) {
          const ulonglong2 v = reinterpret_cast<const ulonglong2*>(p)[i];
          words_[2 * i] = v.x, words_[2 * i + 1] = v.y;
        } else {
          const uint4 v = reinterpret_cast<const uint4*>(p)[i];
          words_[4 * i] = v.x, words_[4 * i + 1] = v.y, words_[4 * i + 2] = v.z, words_[4 * i + 3] = v.w;
        }
      }
    }
  }

  __device__ __forceinline__ void store(S* p) const {
    if constexpr (BYTES < 16) {
      using Access = std::conditional_t<BYTES == 4, uint32_t, uint2>;
      Access v;
      memcpy(&v, words_, BYTES);
      *reinterpret_cast<Access*>(p) = v;
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        if constexpr (sizeof(Word) == 8)
          reinterpret_cast<ulonglong2*>(p)[i] = make_ulonglong2(words_[2 * i], words_[2 * i + 1]);
        else
          reinterpret_cast<uint4*>(p)[i] =
              make_uint4(words_[4 * i], words_[4 * i + 1], words_[4 * i + 2], words_[4 * i + 3]);
      }
    }
  }

  template <class T>
  __device__ __forceinline__ T get(int i) const {
    S element;
    if constexpr (sizeof(S) == 2) {
      const uint16_t bits = static_cast<uint16_t>(words_[i / 2] >> (i % 2 * 16));
      memcpy(&element, &bits, 2);
    } else {
      memcpy(&element, &words_[i], sizeof(S));
    }
    return static_cast<T>(element);
  }

  template <class T>
  __device__ __forceinline__ void set(int i, T value) {
    const S element = static_cast<S>(value);
    if constexpr (sizeof(S) == 2) {
      uint16_t bits;
      memcpy(&bits, &element, 2);
      const uint32_t other = words_[i / 2] & (i % 2 ? 0xffffu : 0xffff0000u);
      words_[i / 2] = other | static_cast<uint32_t>(bits) << (i % 2 * 16);
    } else {
      memcpy(&words_[i], &element, sizeof(S));
    }
  }

 private:
  Word words_[BYTES / sizeof(Word)];
};

}  // namespace ademamix

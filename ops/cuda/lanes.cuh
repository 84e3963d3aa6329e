// N elements of a tensor, read and written by one thread in accesses of up to 16 bytes. They keep the format that they
// have in memory until they are used, so that all loads of a thread are issued before the first conversion.
#pragma once

#include <cstring>
#include <type_traits>

#include "../value.h"
#include "float16.cuh"
#include "kernel_arguments.h"

namespace ademamix {

// Replaces lanes that a kernel doesn't have.
struct Nothing {};

template <class S, int N>
class Lanes {
  static constexpr int BYTES = N * static_cast<int>(sizeof(S));
  using Word = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;
  static constexpr int PER_WORD = static_cast<int>(sizeof(Word) / sizeof(S));
  static constexpr int BITS = 8 * static_cast<int>(sizeof(S));

 public:
  static constexpr int ALIGNMENT = access_alignment(sizeof(S), N);

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

  // Uses intrinsics, because the compiler may split plain stores into words.
  __device__ __forceinline__ void store(S* p) const {
    if constexpr (BYTES < 16) {
      using Access = std::conditional_t<BYTES == 4, uint32_t, uint2>;
      Access v;
      memcpy(&v, words_, BYTES);
      __stwb(reinterpret_cast<Access*>(p), v);
    } else {
#pragma unroll
      for (int i = 0; i < BYTES / 16; ++i) {
        if constexpr (sizeof(Word) == 8)
          __stwb(reinterpret_cast<ulonglong2*>(p) + i, make_ulonglong2(words_[2 * i], words_[2 * i + 1]));
        else
          __stwb(reinterpret_cast<uint4*>(p) + i,
                 make_uint4(words_[4 * i], words_[4 * i + 1], words_[4 * i + 2], words_[4 * i + 3]));
      }
    }
  }

  // Loads the first `count` elements, one by one; the others become `absent`.
  __device__ __forceinline__ void load(const S* p, int count, S absent) {
#pragma unroll
    for (int i = 0; i < N; ++i) set(i, i < count ? p[i] : absent);
  }

  __device__ __forceinline__ void store(S* p, int count) const {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) p[i] = get<S>(i);
  }

  template <class T>
  __device__ __forceinline__ T get(int i) const {
    if constexpr (std::is_same_v<S, bfloat16> && std::is_same_v<T, float>)  // else two shifts
      return float_from_bits(i % 2 ? words_[i / 2] & 0xffff0000 : words_[i / 2] << 16);
    S element;
    const auto bits = static_cast<Bits>(words_[i / PER_WORD] >> (i % PER_WORD * BITS));
    memcpy(&element, &bits, sizeof element);
    return static_cast<T>(element);
  }

  // Returns element i as a float; bytes are extracted by one instruction.
  __device__ __forceinline__ float get_float(int i) const {
    if constexpr (std::is_same_v<S, uint8_t>) return static_cast<float>(__byte_perm(words_[i / 4], 0, 0x4440 + i % 4));
    return static_cast<float>(get<S>(i));
  }

  template <class T>
  __device__ __forceinline__ void set(int i, T value) {
    const S element = static_cast<S>(value);
    Bits bits;
    memcpy(&bits, &element, sizeof bits);
    Word& word = words_[i / PER_WORD];
    const int shift = i % PER_WORD * BITS;
    constexpr Word mask = static_cast<Word>(static_cast<Bits>(-1));
    word = (word & ~(mask << shift)) | static_cast<Word>(bits) << shift;
  }

  // Returns the word that contains element i; the first element of a word is in its lowest bits.
  __device__ __forceinline__ Word word(int i) const { return words_[i / PER_WORD]; }

  // Shifts each element to the left by COUNT bits, and puts the lowest COUNT bits of the other lanes' elements there.
  template <int COUNT>
  __device__ __forceinline__ void append(const Lanes& low) {
    static_assert(sizeof(S) == 2);
    constexpr Word MASK = ((1 << COUNT) - 1) * 0x10001;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words_[i] = (words_[i] << COUNT & ~MASK) | (low.words_[i] & MASK);
  }

  // Sets all elements; integers get the lowest bits of the values from SHIFT on, a multiple of 8.
  template <int SHIFT = 0, class T>
  __device__ __forceinline__ void set_all(const T (&values)[N]) {
    if constexpr (std::is_integral_v<S> && sizeof(S) == 1) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        constexpr unsigned int PAIR = 0x40 + SHIFT / 8 * 0x11;
        const T* v = values + 4 * i;
        words_[i] = __byte_perm(__byte_perm(v[0], v[1], PAIR), __byte_perm(v[2], v[3], PAIR), 0x5410);
      }
    } else if constexpr (std::is_integral_v<S> && sizeof(S) == 2) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        words_[i] = __byte_perm(values[2 * i], values[2 * i + 1], 0x5410 + SHIFT / 8 * 0x1111);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    } else if constexpr (std::is_same_v<S, bfloat16>) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words_[i]) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
    } else if constexpr (std::is_same_v<S, half>) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words_[i]) : "f"(values[2 * i + 1]), "f"(values[2 * i]));
#endif
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) set(i, values[i]);
    }
  }

  // Sets each element to the upper half of a word.
  __device__ __forceinline__ void set_upper_halves(const uint32_t (&words)[N]) {
    static_assert(sizeof(S) == 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words_[i] = __byte_perm(words[2 * i], words[2 * i + 1], 0x7632);
  }

 private:
  using Bits = std::conditional_t<
      sizeof(S) == 8, uint64_t,
      std::conditional_t<sizeof(S) == 4, uint32_t, std::conditional_t<sizeof(S) == 2, uint16_t, uint8_t>>>;

  Word words_[BYTES / sizeof(Word)];
};

}  // namespace ademamix

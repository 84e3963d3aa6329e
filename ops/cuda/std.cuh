// The parts of the standard headers that device code uses; NVRTC doesn't have these headers.
#pragma once

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

#define FLT_MAX 0x1.fffffep127f
#define FLT_EPSILON 0x1p-23f

namespace std {

template <bool CONDITION, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool CONDITION, class T, class F>
using conditional_t = typename conditional<CONDITION, T, F>::type;

template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;

template <class T>
constexpr bool is_integral_v =
    is_same_v<T, int8_t> || is_same_v<T, int16_t> || is_same_v<T, int32_t> || is_same_v<T, int64_t> ||
    is_same_v<T, uint8_t> || is_same_v<T, uint16_t> || is_same_v<T, uint32_t> || is_same_v<T, uint64_t>;

}  // namespace std

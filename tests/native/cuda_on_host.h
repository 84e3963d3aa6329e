// CUDA for g++: the few names that the device code of ops/cuda uses, so that it runs unchanged on the host, under the
// sanitizers.
//
// A launch runs its CTAs one after another. Each thread of a CTA has a context of its own, and runs until it has to
// wait for others: at a barrier or in a shuffle. Not seen are races between threads, and instructions that only
// approximate.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one CTA runs at a time

struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

template <class T>
inline T __ldg(const T* p) {
  return *p;
}

template <class T>
inline void __stwb(T* p, T value) {
  *p = value;
}

inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }  // 0 if NaN

// With the CPU's bits; or toward zero as on a GPU, and with a root of 1 that is an ulp too large, as PTX allows it.
#if defined(AS_INEXACT_AS_A_GPU)
inline float __fmaf_rz(float a, float b, float c) {
  const double exact = std::fma(static_cast<double>(a), b, c);  // where c isn't much smaller than a * b
  const float nearest = static_cast<float>(exact);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(exact) ? std::nextafterf(nearest, 0.0f) : nearest;
}
inline float sqrt_approx(float a) { return a == 1 ? std::nextafterf(1, 2) : std::sqrt(a); }
#else
inline float __fmaf_rz(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt_approx(float a) { return std::sqrt(a); }
#endif

// Of the eight bytes of x and y those that the four lowest digits of the selector name.
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned int>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

namespace cuda_on_host {

// A kernel's arguments lie there, twice under the sanitizer, which clears what it knows of a stack in each switch.
constexpr size_t STACK_BYTES = 1 << 16;
constexpr unsigned int WARP = 32;

struct Thread {
  std::vector<char> stack = std::vector<char>(STACK_BYTES);
  ucontext_t context;
  bool done;
};

// Threads that have to meet before any goes on.
struct Meeting {
  unsigned int waiting = 0, rounds = 0;
};

struct Cta {
  std::vector<Thread> threads;
  unsigned int current = 0, live = 0;
  unsigned long events = 0;  // threads that ended and meetings that took place; none in a whole turn is a deadlock
  Meeting barrier;
  std::vector<Meeting> warps;
  std::vector<uint64_t> exchanged;
  std::function<void()> kernel;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};
inline Cta& cta = *new Cta;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "ERROR: %s (CTA %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void yield() {
  Thread& self = cta.threads[cta.current];
  void* stack_state;
  __sanitizer_start_switch_fiber(self.done ? nullptr : &stack_state, cta.scheduler_stack, cta.scheduler_stack_bytes);
  swapcontext(&self.context, &cta.scheduler);
  __sanitizer_finish_switch_fiber(stack_state, nullptr, nullptr);
}

inline void thread_main() {
  __sanitizer_finish_switch_fiber(nullptr, &cta.scheduler_stack, &cta.scheduler_stack_bytes);
  cta.kernel();
  cta.threads[cta.current].done = true;
  --cta.live, ++cta.events;
  yield();
}

inline void resume(unsigned int thread) {
  cta.current = threadIdx.x = thread;
  Thread& next = cta.threads[thread];
  void* stack_state;
  __sanitizer_start_switch_fiber(&stack_state, next.stack.data(), next.stack.size());
  swapcontext(&cta.scheduler, &next.context);
  __sanitizer_finish_switch_fiber(stack_state, nullptr, nullptr);
}

inline void run_cta(unsigned int threads) {
  if (cta.threads.size() < threads) cta.threads.resize(threads);
  cta.live = threads;
  cta.barrier = {};
  cta.warps.assign((threads + WARP - 1) / WARP, {});
  cta.exchanged.assign(threads, 0);
  for (unsigned int i = 0; i < threads; ++i) {
    Thread& thread = cta.threads[i];
    thread.done = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
  }
  for (bool first = true; cta.live > 0; first = false) {
    const unsigned long events = cta.events;
    for (unsigned int i = 0; i < threads; ++i)
      if (!cta.threads[i].done) resume(i);
    if (!first && cta.events == events) fail("deadlock: threads wait for others that don't come");
  }
}

// Waits until all threads that still run (of the CTA), or all of a full warp, have come.
inline void meet(Meeting& meeting, bool whole_cta) {
  const unsigned int round = meeting.rounds;
  ++meeting.waiting;
  while (meeting.rounds == round) {
    if (meeting.waiting == (whole_cta ? cta.live : WARP)) {
      meeting.waiting = 0;
      ++meeting.rounds, ++cta.events;
    } else {
      yield();
    }
  }
}

inline void meet_warp(unsigned int mask) {
  if (mask != 0xffffffff) fail("only whole warps are emulated");
  meet(cta.warps[threadIdx.x / WARP], false);
}

// The value of another lane.
template <class T>
T exchange(unsigned int mask, T value, unsigned int lane) {
  static_assert(sizeof(T) <= 8);
  const unsigned int self = cta.current;
  std::memcpy(&cta.exchanged[self], &value, sizeof value);
  meet_warp(mask);
  std::memcpy(&value, &cta.exchanged[self / WARP * WARP + lane % WARP], sizeof value);
  meet_warp(mask);
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::meet(cuda_on_host::cta.barrier, true); }
inline void __syncwarp(unsigned int mask = 0xffffffff) { cuda_on_host::meet_warp(mask); }
template <class T>
T __shfl_sync(unsigned int mask, T value, int lane) {
  return cuda_on_host::exchange(mask, value, static_cast<unsigned int>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned int mask, T value, int lanes) {
  return cuda_on_host::exchange(mask, value, threadIdx.x % 32 ^ static_cast<unsigned int>(lanes));
}

namespace cuda_on_host {

inline void launch(unsigned int ctas, unsigned int threads, std::function<void()> kernel) {
  gridDim = ctas, blockDim = threads;
  cta.kernel = std::move(kernel);
  for (blockIdx.x = 0; blockIdx.x < ctas; ++blockIdx.x) run_cta(threads);
}

}  // namespace cuda_on_host

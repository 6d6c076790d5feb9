// Work that the threads of a region share out among themselves.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

inline __attribute__((always_inline)) int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The threads of a region by OpenMP: up to `count` of them call f(number), and all have when `run` returns.
struct Team {
  int count;
  template <class F> void run(int threads, const F& f) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    f(thread_number());
  }
};

// Threads that are worth waking: multiplying 32 K weights takes as long as waking one.
inline int worth(int64_t products, int threads) {
  return int(std::max<int64_t>(1, std::min<int64_t>(threads, products >> 15)));
}

// Pieces of work that each thread takes as it comes by, and that whoever needs them all waits for. Unlike a barrier it
// waits for no thread that has taken nothing: one that wakes late, on a machine with other work, holds nobody up.
class Phase {
 public:
  template <class F> void take(int64_t count, const F& f) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; done.fetch_add(1, std::memory_order_release))
      f(i);
  }
  void wait(int64_t count) const {
    for (int turn = 0; done.load(std::memory_order_acquire) < count; ++turn)
      if (turn > 2000) std::this_thread::yield();
  }
  template <class F> void run(int64_t count, const F& f) { take(count, f), wait(count); }

 private:
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

}  // namespace

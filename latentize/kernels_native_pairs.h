// What the kernels are called with; pairs (token, slot) sorted by expert; the sum over a token's pairs.

#pragma once

#include <cstdlib>

#include "kernels_native_activations.h"
#include "kernels_native_threads.h"

namespace {

template <class W> struct Call {
  int64_t tokens, k, experts, width, inner;  // T, k, N, l, m
  const W *hidden, *weights, *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
  const int64_t* indices;
  bool on_input;
  Activation activation;
};

// Pairs sorted by expert: those of expert e are pair[begin[e] .. begin[e + 1]].
struct Sorted {
  int64_t *begin, *pair;
};

// Returns the number of pairs of real experts, or -1 at a negative index.
int64_t sort_pairs(const int64_t* indices, int64_t count, int64_t experts, Sorted s) {
  std::memset(s.begin, 0, (experts + 2) * sizeof(int64_t));
  for (int64_t p = 0; p < count; ++p) {
    if (indices[p] < 0) return -1;
    if (indices[p] < experts) ++s.begin[indices[p] + 2];
  }
  for (int64_t e = 0; e < experts; ++e) s.begin[e + 2] += s.begin[e + 1];
  for (int64_t p = 0; p < count; ++p)
    if (indices[p] < experts) s.pair[s.begin[indices[p] + 1]++] = p;
  return s.begin[experts];
}

// Scratch memory of the calling thread, kept between calls up to 128 MB.
struct Scratch {
  char* data = nullptr;
  size_t size = 0;
  char* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(data);
      data = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      size = data ? bytes : 0;
    }
    return data;
  }
  void trim() {
    if (size > (size_t(128) << 20)) {
      std::free(data);
      data = nullptr;
      size = 0;
    }
  }
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

template <class S> constexpr int64_t padded(int64_t count) { return (count + lanes<S> - 1) / lanes<S> * lanes<S>; }

// One hidden row, scaled, widened, zeros up to `padded(width)`.
template <class S, class W> void copy_row(const W* from, int64_t width, S scale, S* to) {
  constexpr int n = lanes<S>;
  int64_t i = 0;
  for (; i + n <= width; i += n) store<S>(to + i, scale * load(from + i));
  if (i < width) store<S>(to + i, scale * load_tail<S>(from + i, int(width - i)));
}

// out[t, width] = sum over the pairs of token t, in the order of the slots; pairs of absent experts are skipped.
template <class S, class W>
void combine(const int64_t* indices, int64_t t, int64_t k, int64_t experts, int64_t width, const S* rows, int64_t ld, W* out) {
  constexpr int n = lanes<S>;
  for (int64_t i = 0; i < width; i += n) {
    Vec<S> sum{};
    for (int64_t s = t * k; s < (t + 1) * k; ++s)
      if (indices[s] < experts) sum += load(rows + s * ld + i);
    for (int64_t j = 0; j < std::min<int64_t>(n, width - i); ++j) out[t * width + i + j] = narrow<W>(sum[j]);
  }
}

}  // namespace

// Matrix products on blocks whose columns fill whole vectors; the weights are read where they lie.

#pragma once

#include "kernels_native_vectors.h"

namespace {

constexpr int MR = 8, NV = 3;  // rows and vectors of one register tile
constexpr int SMALL_MR = 4;
#if defined(__AVX512F__)
constexpr int TILE = MR;
#else
constexpr int TILE = SMALL_MR;
#endif
template <class S> constexpr int PANEL = NV * lanes<S>;

// C[mr, nv vectors] (+)= A[mr, k] B[k, nv vectors], A(i, p) = a[i * ai + p * ap].
template <class S, int mr, int nv>
void tile(int64_t k, const S* a, int64_t ai, int64_t ap, const S* b, int64_t ldb, S* c, int64_t ldc, bool add) {
  Vec<S> acc[mr][nv];
#pragma GCC unroll 8
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < nv; ++v) acc[i][v] = add ? load(c + i * ldc + v * lanes<S>) : Vec<S>{};
  auto step = [&](int64_t p) __attribute__((always_inline)) {
    Vec<S> row[nv];
#pragma GCC unroll 3
    for (int v = 0; v < nv; ++v) row[v] = load(b + p * ldb + v * lanes<S>);
#pragma GCC unroll 8
    for (int i = 0; i < mr; ++i) {
      S x = a[i * ai + p * ap];
#pragma GCC unroll 3
      for (int v = 0; v < nv; ++v) acc[i][v] += x * row[v];
    }
  };
  constexpr int per_line = 64 / (sizeof(S) * mr);  // steps in which mr rows advance by a cache line's worth
  int64_t p = 0;
  if (per_line && ap == 1) {
    // The rows of the next tile follow these in memory.
    const S* next = a + mr * ai;
    for (; p + per_line <= k; p += per_line) {
      __builtin_prefetch(next + p * mr, 0, 3);
#pragma GCC unroll 4
      for (int i = 0; i < per_line; ++i) step(p + i);
    }
  }
  for (; p < k; ++p) step(p);
#pragma GCC unroll 8
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < nv; ++v) store(c + i * ldc + v * lanes<S>, acc[i][v]);
}

template <class S, int nv>
INLINE void tiles(int64_t rows, int64_t k, const S* a, int64_t ai, int64_t ap, const S* b, int64_t ldb, S* c, int64_t ldc,
                  bool add) {
  int64_t i = 0;
  if constexpr (TILE == 8 || nv == 1)
    for (; i + 8 <= rows; i += 8) tile<S, 8, nv>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, add);
  for (; i + 4 <= rows; i += 4) tile<S, 4, nv>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, add);
  for (; i < rows; ++i) tile<S, 1, nv>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, add);
}

// C[rows, cols] (+)= A B with cols a multiple of the vector length.
template <class S>
void matmul(int64_t rows, int64_t cols, int64_t k, const S* a, int64_t ai, int64_t ap, const S* b, int64_t ldb, S* c,
            int64_t ldc, bool add) {
  constexpr int n = lanes<S>;
  int64_t j = 0;
  for (; j + 3 * n <= cols; j += 3 * n) tiles<S, 3>(rows, k, a, ai, ap, b + j, ldb, c + j, ldc, add);
  if (j + 2 * n <= cols) {
    tiles<S, 2>(rows, k, a, ai, ap, b + j, ldb, c + j, ldc, add);
    j += 2 * n;
  }
  if (j < cols) tiles<S, 1>(rows, k, a, ai, ap, b + j, ldb, c + j, ldc, add);
}

// Rows [count, k] of a weight matrix in the arithmetic type: where they lie, or widened into `buffer`.
template <class S> INLINE const S* rows_of(const S* weight, int64_t, int64_t, S*) { return weight; }
template <class S, class W> INLINE const S* rows_of(const W* weight, int64_t count, int64_t k, S* buffer) {
  int64_t size = count * k, i = 0;
  for (; i + lanes<S> <= size; i += lanes<S>) store<S>(buffer + i, load(weight + i));
  for (; i < size; ++i) buffer[i] = widen(weight[i]);
  return buffer;
}

}  // namespace

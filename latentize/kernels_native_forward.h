// Forward. An expert with few tokens is computed as dot products along its rows; one with many as matrix products on
// blocks of tokens laid out [width][tokens], its weights broadcast.

#pragma once

#include "kernels_native_matmul.h"
#include "kernels_native_pairs.h"

namespace {

constexpr int AHEAD = 12;         // steps of a vector that dot products read ahead
constexpr int64_t FEW = 8;  // up to so many tokens, an expert is computed by dot products

// Lane r * nt + t of the result is the dot product of weight row r with vector t; lanes / nt rows.
template <class S, class W, int nt> INLINE Vec<S> dots(const W* weight, int64_t k, const S* const* x, int64_t rows) {
  constexpr int n = lanes<S>, nr = n / nt;
  Vec<S> acc[n] = {};
  const W* row[nr];
  for (int r = 0; r < nr; ++r) row[r] = weight + std::min<int64_t>(r, rows - 1) * k;
  int64_t i = 0;
  for (; i + n <= k; i += n) {
    // Some steps ahead: in these rows, or in those that follow them in memory.
    const int64_t ahead = i + AHEAD * n < k ? i + AHEAD * n : nr * k + i + AHEAD * n - k;
    Vec<S> v[nt];
#pragma GCC unroll 4
    for (int t = 0; t < nt; ++t) v[t] = load(x[t] + i);
#pragma GCC unroll 16
    for (int r = 0; r < nr; ++r) {
      __builtin_prefetch(row[r] + ahead, 0, 3);
      Vec<S> w = load(row[r] + i);
#pragma GCC unroll 4
      for (int t = 0; t < nt; ++t) acc[r * nt + t] += w * v[t];
    }
  }
  if (i < k)
    for (int r = 0; r < nr; ++r) {
      Vec<S> w = load_tail<S>(row[r] + i, int(k - i));
      for (int t = 0; t < nt; ++t) acc[r * nt + t] += w * load_tail<S>(x[t] + i, int(k - i));
    }
  return sums<S, n / 2>(acc);
}

template <class S, class W, int nt> INLINE Vec<S> spread(const W* bias, int64_t rows) {
  Vec<S> v{};
  for (int r = 0; r < std::min<int64_t>(lanes<S> / nt, rows); ++r)
    for (int t = 0; t < nt; ++t) v[r * nt + t] = widen(bias[r]);
  return v;
}

// Rows [first, last) of up (and gate) for nt tokens: activations into h[t].
template <class S, class W, int nt>
void few_up(const Call<W>& c, int64_t e, int64_t first, int64_t last, const S* const* x, S* const* h) {
  constexpr int nr = lanes<S> / nt;
  for (int64_t j = first; j < last; j += nr) {
    int64_t rows = std::min<int64_t>(nr, last - j), at = e * c.inner + j;
    Vec<S> u = dots<S, W, nt>(c.up + at * c.width, c.width, x, rows), g{};
    if (c.up_bias) u += spread<S, W, nt>(c.up_bias + at, rows);
    if (c.gate) g = dots<S, W, nt>(c.gate + at * c.width, c.width, x, rows);
    if (c.gate_bias) g += spread<S, W, nt>(c.gate_bias + at, rows);
    Vec<S> a = activate<S>(c.activation, c.gate != nullptr, g, u);
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < nt; ++t) h[t][j + r] = a[r * nt + t];
  }
}

template <class S, class W, int nt>
void few_down(const Call<W>& c, int64_t e, int64_t first, int64_t last, const S* const* h, const S* w, S* const* y) {
  constexpr int nr = lanes<S> / nt;
  for (int64_t i = first; i < last; i += nr) {
    int64_t rows = std::min<int64_t>(nr, last - i), at = e * c.width + i;
    Vec<S> o = dots<S, W, nt>(c.down + at * c.inner, c.inner, h, rows);
    if (c.down_bias) o += spread<S, W, nt>(c.down_bias + at, rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int t = 0; t < nt; ++t) y[t][i + r] = w[t] * o[r * nt + t];
  }
}

template <class S> struct BlockSizes {
  int64_t x, h, y, rows, gate;  // elements of each scratch part
  BlockSizes(int64_t width, int64_t inner)
      : x(width * PANEL<S>), h(inner * PANEL<S>), y(width * PANEL<S>),
        rows(std::max(PANEL<S> * padded<S>(width), int64_t(MR) * (std::max(width, inner) + lanes<S>))),
        gate(2 * MR * PANEL<S>) {}
  int64_t total() const { return x + h + y + rows + gate; }
};

template <class S, class W>
void many(const Call<W>& c, int64_t e, const int64_t* pair, int64_t count, S* memory, S* out, int64_t ld) {
  constexpr int n = lanes<S>;
  BlockSizes<S> size(c.width, c.inner);
  S *x = memory, *h = x + size.x, *y = h + size.h, *rows = y + size.y, *g = rows + size.rows, *u = g + MR * PANEL<S>;
  const int64_t cols = padded<S>(count), ldr = padded<S>(c.width);
  S scale[PANEL<S>];
  for (int64_t t = 0; t < count; ++t) {
    S w = widen(c.weights[pair[t]]);
    copy_row<S>(c.hidden + pair[t] / c.k * c.width, c.width, c.on_input ? w : S(1), rows + t * ldr);
    scale[t] = c.on_input ? S(1) : w;
  }
  transpose_to<S>(rows, ldr, count, c.width, x, PANEL<S>);
  for (int64_t j = 0; j < c.inner; j += MR) {
    int64_t mr = std::min<int64_t>(MR, c.inner - j), at = e * c.inner + j;
    const S* a = rows_of<S>(c.up + at * c.width, mr, c.width, rows);
    matmul<S>(mr, cols, c.width, a, c.width, 1, x, PANEL<S>, u, PANEL<S>, false);
    if (c.gate) {
      a = rows_of<S>(c.gate + at * c.width, mr, c.width, rows);
      matmul<S>(mr, cols, c.width, a, c.width, 1, x, PANEL<S>, g, PANEL<S>, false);
    }
    for (int64_t r = 0; r < mr; ++r) {
      S bu = c.up_bias ? widen(c.up_bias[at + r]) : S(0), bg = c.gate_bias ? widen(c.gate_bias[at + r]) : S(0);
      for (int64_t t = 0; t < cols; t += n) {
        Vec<S> gv = c.gate ? load(g + r * PANEL<S> + t) + bg : Vec<S>{};
        store<S>(h + (j + r) * PANEL<S> + t,
                 activate<S>(c.activation, c.gate != nullptr, gv, load(u + r * PANEL<S> + t) + bu));
      }
    }
  }
  for (int64_t i = 0; i < c.width; i += MR) {
    int64_t mr = std::min<int64_t>(MR, c.width - i), at = e * c.width + i;
    const S* a = rows_of<S>(c.down + at * c.inner, mr, c.inner, rows);
    matmul<S>(mr, cols, c.inner, a, c.inner, 1, h, PANEL<S>, y + i * PANEL<S>, PANEL<S>, false);
    if (c.down_bias)
      for (int64_t r = 0; r < mr; ++r)
        for (int64_t t = 0; t < cols; t += n)
          store<S>(y + (i + r) * PANEL<S> + t, load(y + (i + r) * PANEL<S> + t) + widen(c.down_bias[at + r]));
  }
  transpose_to<S>(y, PANEL<S>, c.width, count, rows, ldr);
  for (int64_t t = 0; t < count; ++t) copy_row<S>(rows + t * ldr, c.width, scale[t], out + pair[t] * ld);
}

struct Work {
  int64_t expert, first, count;  // pairs [first, first + count) of the sorted pairs
};

// Calls f(number of tokens, first token): by fours where lanes allow (a missing fourth repeats the last), twos, ones.
template <class S, class F> INLINE void in_groups(int64_t count, const F& f) {
  int64_t t = 0;
  if constexpr (lanes<S> >= 4)
    for (; count - t >= 3; t += 4) f(std::integral_constant<int, 4>{}, t);
  for (; count - t >= 2; t += 2) f(std::integral_constant<int, 2>{}, t);
  if (count - t >= 1) f(std::integral_constant<int, 1>{}, t);
}

template <class S, class W> int forward(const Call<W>& c, W* out, int threads) {
  const int64_t pairs = c.tokens * c.k, ld = padded<S>(c.width), ldh = padded<S>(c.inner);
  const BlockSizes<S> size(c.width, c.inner);
  const int64_t per_thread = (size.total() + 15) / 16 * 16;
  const int64_t most_work = std::min(pairs, c.experts) + pairs / PANEL<S> + 1;
  const int64_t few_rows = std::min(pairs, c.experts * FEW);
  size_t ints = (c.experts + 2 + pairs + few_rows) * sizeof(int64_t) + 2 * most_work * sizeof(Work);
  size_t bytes = (ints + 63) / 64 * 64 + (pairs * ld + few_rows * (ldh + ld) + threads * per_thread) * sizeof(S);
  char* memory = scratch.reserve(bytes);
  if (!memory) return 2;
  Sorted sorted{reinterpret_cast<int64_t*>(memory), reinterpret_cast<int64_t*>(memory) + c.experts + 2};
  if (sort_pairs(c.indices, pairs, c.experts, sorted) < 0) return 1;
  Work* big = reinterpret_cast<Work*>(sorted.pair + pairs + few_rows);
  Work* small = big + most_work;
  int64_t bigs = 0, smalls = 0, rows = 0;
  for (int64_t e = 0; e < c.experts; ++e) {
    int64_t first = sorted.begin[e], count = sorted.begin[e + 1] - first;
    if (count > FEW)
      for (int64_t at = 0; at < count; at += PANEL<S>)
        big[bigs++] = {e, first + at, std::min<int64_t>(PANEL<S>, count - at)};
    else if (count)
      small[smalls++] = {e, first, count}, rows += count;
  }
  // Few experts and many threads: cut the rows of each expert, so that every thread has something to do.
  const int64_t cuts = smalls ? std::max<int64_t>(1, std::min<int64_t>(3 * threads / (smalls + bigs), c.inner / 64)) : 1;
  S* y = reinterpret_cast<S*>(memory + (ints + 63) / 64 * 64);
  S *x = y + pairs * ld, *h = x + few_rows * ld, *local = h + few_rows * ldh;
  // Row of x and h of the small experts' sorted pairs: small experts come in order, so a running number does.
  int64_t* row_of = sorted.pair + pairs;
  for (int64_t i = 0, row = 0; i < smalls; ++i) row_of[i] = row, row += small[i].count;
  const Call<W>* call = &c;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    S* mine = local + thread_number() * per_thread;
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < bigs; ++item)
      many<S, W>(*call, big[item].expert, sorted.pair + big[item].first, big[item].count, mine, y, ld);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < smalls * cuts; ++item) {
      const Work& work = small[item / cuts];
      const int64_t cut = item % cuts, step = padded<S>((call->inner + cuts - 1) / cuts);
      const int64_t first = std::min(call->inner, cut * step), last = std::min(call->inner, first + step);
      const S* from[FEW + 4];
      S* to[FEW + 4];
      for (int64_t t = 0; t < FEW + 4; ++t) {
        int64_t row = row_of[item / cuts] + std::min(t, work.count - 1), pair = sorted.pair[work.first + std::min(t, work.count - 1)];
        // Each cut keeps its own copy of the token, in the thread's memory.
        S* copy = mine + t * ld;
        if (t < work.count)
          copy_row<S>(call->hidden + pair / call->k * call->width, call->width,
                      call->on_input ? S(widen(call->weights[pair])) : S(1), copy);
        from[t] = mine + std::min(t, work.count - 1) * ld;
        to[t] = h + row * ldh;
      }
      in_groups<S>(work.count, [&](auto nt, int64_t t) {
        few_up<S, W, nt.value>(*call, work.expert, first, last, from + t, to + t);
      });
    }
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < smalls * cuts; ++item) {
      const Work& work = small[item / cuts];
      const int64_t cut = item % cuts, step = padded<S>((call->width + cuts - 1) / cuts);
      const int64_t first = std::min(call->width, cut * step), last = std::min(call->width, first + step);
      const S* from[FEW + 4];
      S* to[FEW + 4];
      S scale[FEW + 4];
      for (int64_t t = 0; t < FEW + 4; ++t) {
        int64_t own = std::min(t, work.count - 1), pair = sorted.pair[work.first + own];
        from[t] = h + (row_of[item / cuts] + own) * ldh;
        to[t] = y + pair * ld;
        scale[t] = call->on_input ? S(1) : S(widen(call->weights[pair]));
      }
      in_groups<S>(work.count, [&](auto nt, int64_t t) {
        few_down<S, W, nt.value>(*call, work.expert, first, last, from + t, scale + t, to + t);
      });
    }
    combine<S, W>(call->indices, call->tokens, call->k, call->experts, call->width, y, ld, out);
  }
  scratch.trim();
  return 0;
}

}  // namespace

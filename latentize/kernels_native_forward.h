// Forward. An expert with few tokens is computed as dot products along its rows; one with many as matrix products on
// blocks of tokens laid out [width][tokens], its weights broadcast.

#pragma once

#include "kernels_native_matmul.h"
#include "kernels_native_pairs.h"

namespace {

constexpr int64_t AHEAD = 4096;  // bytes that dot products read ahead
constexpr int64_t FEW = 8;       // up to so many tokens, an expert is computed by dot products

// Lane r * nt + t of the result is the dot product of weight row r with vector t; lanes / nt rows. The rows are read one
// after the other, as they lie in memory: processors fetch ahead along a line, less well along several at once.
template <class S, class W, int nt> INLINE Vec<S> dots(const W* weight, int64_t k, const S* const* x, int64_t rows) {
  constexpr int n = lanes<S>, nr = n / nt;
  constexpr int line = 64 / (n * sizeof(W)) > 1 ? 64 / (n * sizeof(W)) : 1;  // vectors of a row in a cache line
  constexpr int steps = nt == 1 ? line : nt == 2 && line > 1 ? 2 : 1;
  Vec<S> acc[n];
#pragma GCC unroll 16
  for (int r = 0; r < nr; ++r) {
    const W* row = weight + std::min<int64_t>(r, rows - 1) * k;
    Vec<S> part[steps][nt] = {};
    int64_t i = 0;
    for (; i + steps * n <= k; i += steps * n) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + i) + AHEAD, 0, 3);
#pragma GCC unroll 4
      for (int s = 0; s < steps; ++s) {
        Vec<S> w = load(row + i + s * n);
#pragma GCC unroll 4
        for (int t = 0; t < nt; ++t) part[s][t] += w * load(x[t] + i + s * n);
      }
    }
    for (; i < k; i += n) {
      const int left = int(std::min<int64_t>(n, k - i));
      Vec<S> w = load_tail<S>(row + i, left);
      for (int t = 0; t < nt; ++t) part[0][t] += w * load_tail<S>(x[t] + i, left);
    }
#pragma GCC unroll 4
    for (int t = 0; t < nt; ++t) {
      acc[r * nt + t] = part[0][t];
#pragma GCC unroll 4
      for (int s = 1; s < steps; ++s) acc[r * nt + t] += part[s][t];
    }
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

// Adds one value to `count` elements, a multiple of the lanes.
template <class S> INLINE void add_to(S value, S* to, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<S>) store<S>(to + i, load(to + i) + value);
}

template <class S, class W>
void many(const Call<W>& c, int64_t e, const int64_t* pair, int64_t count, S* memory, S* out, int64_t ld) {
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
      S *const ur = u + r * PANEL<S>, *const gr = g + r * PANEL<S>;
      if (c.up_bias) add_to<S>(widen(c.up_bias[at + r]), ur, cols);
      if (c.gate_bias) add_to<S>(widen(c.gate_bias[at + r]), gr, cols);
      activate_all<S>(c.activation, c.gate != nullptr, gr, ur, h + (j + r) * PANEL<S>, cols);
    }
  }
  for (int64_t i = 0; i < c.width; i += MR) {
    int64_t mr = std::min<int64_t>(MR, c.width - i), at = e * c.width + i;
    const S* a = rows_of<S>(c.down + at * c.inner, mr, c.inner, rows);
    matmul<S>(mr, cols, c.inner, a, c.inner, 1, h, PANEL<S>, y + i * PANEL<S>, PANEL<S>, false);
    if (c.down_bias)
      for (int64_t r = 0; r < mr; ++r) add_to<S>(widen(c.down_bias[at + r]), y + (i + r) * PANEL<S>, cols);
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

// The experts with few tokens. Each is one piece of work; where threads outnumber them, their rows are cut.
template <class S, class W> struct Small {
  const Call<W>& call;
  const int64_t* pair;  // sorted pairs
  Work* work;
  int64_t *row_of, count, cuts;  // row of h of each one's first pair
  S *h, *y;                      // [rows, padded m], [T * k, padded l]

  // Up to FEW + 4 rows of pointers: past the last, the last.
  template <class F> INLINE void each(const Work& w, const F& f) const {
    for (int64_t t = 0; t < FEW + 4; ++t) f(t, std::min(t, w.count - 1), pair[w.first + std::min(t, w.count - 1)]);
  }
  // Rows [first, last) of `total` that a cut takes.
  INLINE std::pair<int64_t, int64_t> cut_of(int64_t total, int64_t cut) const {
    const int64_t step = padded<S>((total + cuts - 1) / cuts), first = std::min(total, cut * step);
    return {first, std::min(total, first + step)};
  }
  // Each cut keeps its own copy of the tokens, in the thread's memory `mine`.
  void up(int64_t item, int64_t cut, S* mine) const {
    const Work& w = work[item];
    const int64_t ld = padded<S>(call.width), ldh = padded<S>(call.inner);
    const S* from[FEW + 4];
    S* to[FEW + 4];
    each(w, [&](int64_t t, int64_t own, int64_t p) {
      if (t == own)
        copy_row<S>(call.hidden + p / call.k * call.width, call.width, call.on_input ? S(widen(call.weights[p])) : S(1),
                    mine + t * ld);
      from[t] = mine + own * ld;
      to[t] = h + (row_of[item] + own) * ldh;
    });
    const auto [first, last] = cut_of(call.inner, cut);
    in_groups<S>(w.count, [&, first = first, last = last](auto nt, int64_t t) {
      few_up<S, W, nt.value>(call, w.expert, first, last, from + t, to + t);
    });
  }
  void down(int64_t item, int64_t cut) const {
    const Work& w = work[item];
    const int64_t ld = padded<S>(call.width), ldh = padded<S>(call.inner);
    const S* from[FEW + 4];
    S *to[FEW + 4], scale[FEW + 4];
    each(w, [&](int64_t t, int64_t own, int64_t p) {
      from[t] = h + (row_of[item] + own) * ldh;
      to[t] = y + p * ld;
      scale[t] = call.on_input ? S(1) : S(widen(call.weights[p]));
    });
    const auto [first, last] = cut_of(call.width, cut);
    in_groups<S>(w.count, [&, first = first, last = last](auto nt, int64_t t) {
      few_down<S, W, nt.value>(call, w.expert, first, last, from + t, scale + t, to + t);
    });
  }
  // By all threads of a region, each with its own memory of FEW rows. Whole experts: nobody waits between the halves.
  void run(Phase& first, Phase& second, S* mine) const {
    if (cuts == 1)
      return first.run(count, [&](int64_t item) { up(item, 0, mine), down(item, 0); });
    first.run(count * cuts, [&](int64_t i) { up(i / cuts, i % cuts, mine); });
    second.run(count * cuts, [&](int64_t i) { down(i / cuts, i % cuts); });
  }
};

// Into how many pieces the rows of each small expert are cut so that every thread has something to do.
INLINE int64_t cuts_of(int64_t smalls, int64_t bigs, int64_t inner, int threads) {
  return smalls ? std::max<int64_t>(1, std::min<int64_t>(3 * threads / (smalls + bigs), inner / 64)) : 1;
}

// `team` has a `count` of threads and runs regions of them, as `Team` does.
template <class S, class W, class T> int forward(const Call<W>& c, W* out, const T& team) {
  const int64_t pairs = c.tokens * c.k, ld = padded<S>(c.width), ldh = padded<S>(c.inner);
  const int threads = worth(pairs * c.width * c.inner * (c.gate ? 3 : 2), team.count);
  const BlockSizes<S> size(c.width, c.inner);
  const int64_t per_thread = (size.total() + 15) / 16 * 16;
  const int64_t most_work = std::min(pairs, c.experts) + pairs / PANEL<S> + 1;
  const int64_t few_rows = std::min(pairs, c.experts * FEW);
  size_t ints = (c.experts + 2 + pairs + few_rows) * sizeof(int64_t) + 2 * most_work * sizeof(Work);
  size_t bytes = (ints + 63) / 64 * 64 + (pairs * ld + few_rows * ldh + threads * per_thread) * sizeof(S);
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
  S* y = reinterpret_cast<S*>(memory + (ints + 63) / 64 * 64);
  S *h = y + pairs * ld, *local = h + few_rows * ldh;
  // Row of h of the small experts' sorted pairs: small experts come in order, so a running number does.
  int64_t* row_of = sorted.pair + pairs;
  for (int64_t i = 0, row = 0; i < smalls; ++i) row_of[i] = row, row += small[i].count;
  const Small<S, W> few{c, sorted.pair, small, row_of, smalls, cuts_of(smalls, bigs, c.inner, threads), h, y};
  Phase many_tokens, half, other_half, summing;
  team.run(threads, [&](int64_t number) {
    S* mine = local + number * per_thread;
    many_tokens.take(bigs, [&](int64_t i) {
      many<S, W>(c, big[i].expert, sorted.pair + big[i].first, big[i].count, mine, y, ld);
    });
    few.run(half, other_half, mine);
    many_tokens.wait(bigs);
    summing.take(c.tokens, [&](int64_t t) { combine<S, W>(c.indices, t, c.k, c.experts, c.width, y, ld, out); });
  });
  scratch.trim();
  return 0;
}

}  // namespace

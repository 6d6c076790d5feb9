// Forward on weights that were laid out anew once: matrices cut into panels of a few rows, each [width][rows], so that
// vectors run along the rows. Nothing is transposed, no token is padded, and every weight is read once for up to CHUNK
// tokens, one after the other as they lie in memory. It costs a second copy of the weights.

#pragma once

#include <type_traits>

#include "kernels_native_forward.h"

namespace {

constexpr int64_t FURTHER = 2 * AHEAD;  // bytes that panels read ahead
template <class S> constexpr int64_t ROWS = 2 * lanes<S>;  // of a panel
template <class S> constexpr int64_t whole_panels(int64_t rows) { return (rows + ROWS<S> - 1) / ROWS<S>; }
#if defined(__AVX512F__)
constexpr int64_t TOKENS = 8;  // of one register tile
#else
constexpr int64_t TOKENS = 6;
#endif
constexpr int64_t CHUNK = 48;  // tokens of one expert at a time

// The weights of N experts, one expert after the other: for every panel of rows of `up`, that of `up` and, where there is a
// gate, that of `gate`; then the panels of `down`. Absent rows of a last panel are zero.
template <class S, class W> struct Panels {
  const W* data;
  int64_t inner, width, gated;  // m, l, 1 or 0

  int64_t up_size() const { return ROWS<S> * width; }  // elements of one panel
  int64_t down_size() const { return ROWS<S> * inner; }
  int64_t expert_size() const {
    return whole_panels<S>(inner) * up_size() * (1 + gated) + whole_panels<S>(width) * down_size();
  }
  int64_t row_bytes() const { return up_size() * (1 + gated) * sizeof(W); }  // of the panels of the same rows
  const W* up(int64_t expert, int64_t panel) const { return data + expert * expert_size() + panel * up_size() * (1 + gated); }
  const W* gate(int64_t expert, int64_t panel) const { return up(expert, panel) + up_size(); }
  const W* down(int64_t expert, int64_t panel) const {
    return up(expert, whole_panels<S>(inner)) + panel * down_size();
  }
};

// The panel of rows [first, first + ROWS) of a matrix [rows, k].
template <class S, class W> W* pack_panel(const W* from, int64_t first, int64_t rows, int64_t k, W* to) {
  for (int64_t p = 0; p < k; ++p)
    for (int64_t r = first; r < first + ROWS<S>; ++r) *to++ = r < rows ? from[r * k + p] : W{};
  return to;
}

// All of `n` experts into `to`; up and gate are [n, m, l], down is [n, l, m].
template <class S, class W> void pack(const Panels<S, W>& as, int64_t n, const W* gate, const W* up, const W* down, W* to) {
  const int64_t m = as.inner, l = as.width;
  for (int64_t e = 0; e < n; ++e) {
    for (int64_t row = 0; row < m; row += ROWS<S>) {
      to = pack_panel<S>(up + e * m * l, row, m, l, to);
      if (gate) to = pack_panel<S>(gate + e * m * l, row, m, l, to);
    }
    for (int64_t row = 0; row < l; row += ROWS<S>) to = pack_panel<S>(down + e * l * m, row, l, m, to);
  }
}

// What a call of panel_times reads ahead: one address for every step, `pace` bytes after the last.
struct Stream {
  const char* at;
  int64_t pace;
};

// out[i] = the rows of panel b [k][ROWS] times vector x[i].
template <class S, class W, int nt>
void panel_times(int64_t k, const S* const* x, const W* b, S (*out)[ROWS<S>], Stream ahead) {
  constexpr int n = lanes<S>, steps = nt == 1 ? 4 : nt == 2 ? 2 : 1;
  Vec<S> acc[steps][nt][2] = {};
  const auto step = [&](int64_t p, int s) __attribute__((always_inline)) {
    __builtin_prefetch(ahead.at + p * ahead.pace, 0, 3);
    const Vec<S> first = load(b + p * ROWS<S>), second = load(b + p * ROWS<S> + n);
#pragma GCC unroll 8
    for (int i = 0; i < nt; ++i) {
      const S value = x[i][p];
      acc[s][i][0] += value * first;
      acc[s][i][1] += value * second;
    }
  };
  int64_t p = 0;
  for (; p + steps <= k; p += steps)
#pragma GCC unroll 4
    for (int s = 0; s < steps; ++s) step(p + s, s);
  for (; p < k; ++p) step(p, 0);
#pragma GCC unroll 8
  for (int i = 0; i < nt; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
#pragma GCC unroll 4
      for (int s = 1; s < steps; ++s) acc[0][i][v] += acc[s][i][v];
      store<S>(out[i] + v * n, acc[0][i][v]);
    }
}

template <class S, class W>
INLINE void panel_times(int64_t nt, int64_t k, const S* const* x, const W* b, S (*out)[ROWS<S>], Stream ahead) {
  switch (nt) {
    case 1: return panel_times<S, W, 1>(k, x, b, out, ahead);
    case 2: return panel_times<S, W, 2>(k, x, b, out, ahead);
    case 3: return panel_times<S, W, 3>(k, x, b, out, ahead);
    case 4: return panel_times<S, W, 4>(k, x, b, out, ahead);
    case 5: return panel_times<S, W, 5>(k, x, b, out, ahead);
    case 6: return panel_times<S, W, 6>(k, x, b, out, ahead);
#if defined(__AVX512F__)
    case 7: return panel_times<S, W, 7>(k, x, b, out, ahead);
    default: return panel_times<S, W, 8>(k, x, b, out, ahead);
#endif
  }
}

// out[t] = panel b [k][ROWS] times x[t] for `count` tokens, in as few groups of TOKENS at most as there can be, of much the
// same size. Several groups share out among them the reading of what lies `next` bytes on, which one is too quick for.
template <class S, class W>
void panel_times_all(int64_t count, int64_t k, const S* const* x, const W* b, S (*out)[ROWS<S>], int64_t next) {
  constexpr int64_t wide = ROWS<S> * sizeof(W);
  const int64_t groups = (count + TOKENS - 1) / TOKENS;
  const char* panel = reinterpret_cast<const char*>(b);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t t = g * count / groups, nt = (g + 1) * count / groups - t;
    const Stream ahead = groups == 1 ? Stream{panel + FURTHER, wide}
                                     : Stream{panel + next + g * k * wide / groups, (wide + groups - 1) / groups};
    panel_times<S, W>(nt, k, x + t, b, out + t, ahead);
  }
}

// Adds the bias of rows [row, row + ROWS) of `rows` to `count` tokens; past the last row it is zero.
template <class S, class W> void add_bias(const W* bias, int64_t row, int64_t rows, S (*to)[ROWS<S>], int64_t count) {
  for (int v = 0; v < 2; ++v) {
    const int64_t at = row + v * lanes<S>, left = rows - at;
    if (left <= 0) return;
    const Vec<S> value = left >= lanes<S> ? load(bias + at) : load_tail<S>(bias + at, int(left));
    for (int64_t t = 0; t < count; ++t) store<S>(to[t] + v * lanes<S>, load(to[t] + v * lanes<S>) + value);
  }
}

// The experts that were hit, each with up to CHUNK tokens. Where threads outnumber them, their panels are cut.
template <class S, class W> struct InPanels {
  const Call<W>& call;
  const Panels<S, W>& panels;
  const int64_t* pair;  // sorted pairs
  const Work* work;
  int64_t count, cuts, ld, ldh;
  S *h, *y;  // [count * CHUNK, ldh] where there are cuts, [T * k, ld]

  static constexpr bool copies(const Call<W>& c) { return c.on_input || !std::is_same_v<S, W>; }

  // Panels [first, last) of `total` that a cut takes.
  INLINE std::pair<int64_t, int64_t> cut_of(int64_t total, int64_t cut) const {
    return {cut * total / cuts, (cut + 1) * total / cuts};
  }
  void up(int64_t item, int64_t cut, S* to, S* copied) const {
    const Work& w = work[item];
    const S* x[CHUNK];
    for (int64_t t = 0; t < w.count; ++t) {
      const int64_t p = pair[w.first + t];
      const W* row = call.hidden + p / call.k * call.width;
      if constexpr (std::is_same_v<S, W>) x[t] = row;
      if (!copies(call)) continue;
      copy_row<S>(row, call.width, call.on_input ? S(widen(call.weights[p])) : S(1), copied + t * ld);
      x[t] = copied + t * ld;
    }
    const int64_t m = call.inner;
    const auto [begin, end] = cut_of(whole_panels<S>(m), cut);
    S u[CHUNK][ROWS<S>], g[CHUNK][ROWS<S>];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * ROWS<S>;
      panel_times_all<S, W>(w.count, call.width, x, panels.up(w.expert, i), u, panels.row_bytes());
      if (call.up_bias) add_bias<S>(call.up_bias + w.expert * m, row, m, u, w.count);
      if (call.gate) panel_times_all<S, W>(w.count, call.width, x, panels.gate(w.expert, i), g, panels.row_bytes());
      if (call.gate_bias) add_bias<S>(call.gate_bias + w.expert * m, row, m, g, w.count);
      activate_all<S>(call.activation, call.gate != nullptr, g[0], u[0], u[0], w.count * ROWS<S>);
      for (int64_t t = 0; t < w.count; ++t)
        for (int v = 0; v < 2; ++v) store<S>(to + t * ldh + row + v * lanes<S>, load(u[t] + v * lanes<S>));
    }
  }
  void down(int64_t item, int64_t cut, const S* from) const {
    const Work& w = work[item];
    const S* x[CHUNK];
    for (int64_t t = 0; t < w.count; ++t) x[t] = from + t * ldh;
    const int64_t l = call.width;
    const auto [begin, end] = cut_of(whole_panels<S>(l), cut);
    S o[CHUNK][ROWS<S>];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * ROWS<S>;
      panel_times_all<S, W>(w.count, call.inner, x, panels.down(w.expert, i), o, panels.down_size() * sizeof(W));
      if (call.down_bias) add_bias<S>(call.down_bias + w.expert * l, row, l, o, w.count);
      for (int64_t t = 0; t < w.count; ++t) {
        const int64_t p = pair[w.first + t];
        const S scale = call.on_input ? S(1) : S(widen(call.weights[p]));
        for (int v = 0; v < 2; ++v) store<S>(y + p * ld + row + v * lanes<S>, scale * load(o[t] + v * lanes<S>));
      }
    }
  }
  // By all threads of a region, each with its own memory `mine`: hidden activations, copies of tokens.
  void run(Phase& first, Phase& second, S* mine) const {
    S* copied = mine + (cuts == 1 ? CHUNK * ldh : 0);
    if (cuts == 1) return first.run(count, [&](int64_t item) { up(item, 0, mine, copied), down(item, 0, mine); });
    first.run(count * cuts, [&](int64_t i) { up(i / cuts, i % cuts, h + i / cuts * CHUNK * ldh, copied); });
    second.run(count * cuts, [&](int64_t i) { down(i / cuts, i % cuts, h + i / cuts * CHUNK * ldh); });
  }
};

// As `forward`, with the weights of the experts in `panels` too.
template <class S, class W, class T> int forward_packed(const Call<W>& c, const Panels<S, W>& panels, W* out, const T& team) {
  const int64_t pairs = c.tokens * c.k, ld = whole_panels<S>(c.width) * ROWS<S>;
  const int64_t ldh = (whole_panels<S>(c.inner) + 1) * ROWS<S>;  // seldom a power of two, at which rows share cache sets
  const int threads = worth(pairs * c.width * c.inner * (c.gate ? 3 : 2), team.count);
  const int64_t most = std::min(pairs, c.experts) + pairs / CHUNK + 1;
  const size_t ints = (c.experts + 2 + pairs) * sizeof(int64_t) + most * sizeof(Work), head = (ints + 63) / 64 * 64;
  const int64_t most_cut = std::min<int64_t>(most, 2 * threads);  // cuts are for fewer than 3 / 2 of them a thread
  const int64_t per_thread = CHUNK * (ldh + ld);
  char* memory = scratch.reserve(head + (pairs * ld + most_cut * CHUNK * ldh + threads * per_thread) * sizeof(S));
  if (!memory) return 2;
  Sorted sorted{reinterpret_cast<int64_t*>(memory), reinterpret_cast<int64_t*>(memory) + c.experts + 2};
  if (sort_pairs(c.indices, pairs, c.experts, sorted) < 0) return 1;
  Work* work = reinterpret_cast<Work*>(sorted.pair + pairs);
  int64_t count = 0;
  for (int64_t e = 0; e < c.experts; ++e)
    for (int64_t at = sorted.begin[e]; at < sorted.begin[e + 1]; at += CHUNK)
      work[count++] = {e, at, std::min(CHUNK, sorted.begin[e + 1] - at)};
  S *y = reinterpret_cast<S*>(memory + head), *h = y + pairs * ld, *local = h + most_cut * CHUNK * ldh;
  const InPanels<S, W> items{c, panels, sorted.pair, work, count, cuts_of(count, 0, c.inner, threads), ld, ldh, h, y};
  Phase half, other_half, summing;
  team.run(threads, [&](int64_t number) {
    items.run(half, other_half, local + number * per_thread);
    summing.take(c.tokens, [&](int64_t t) { combine<S, W>(c.indices, t, c.k, c.experts, c.width, y, ld, out); });
  });
  scratch.trim();
  return 0;
}

}  // namespace

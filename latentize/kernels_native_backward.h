// Backward, in fp32 and fp64: every block of tokens computes its pre-activations again.

#pragma once

#include "kernels_native_matmul.h"
#include "kernels_native_pairs.h"

namespace {

template <class S> struct Grads {
  S *hidden, *weights, *gate, *up, *down, *gate_bias, *up_bias, *down_bias;  // those of the experts may be null
};

// One thread's memory for a block of tokens, and sums of matrices whose rows do not fill whole vectors.
template <class S> struct BackwardMemory {
  static constexpr int64_t B = 2 * PANEL<S>;  // tokens in a block
  int64_t ldx, ldh;
  S *rows, *x_rows, *x, *grad, *dx, *g, *u, *h, *dh, *h_rows, *sum_gate, *sum_up, *sum_down;

  static int64_t elements(int64_t width, int64_t inner) {
    const int64_t ldx = padded<S>(width), ldh = padded<S>(inner);
    return B * (2 * ldx + 3 * width + 4 * inner + ldh) + 2 * inner * ldx + width * ldh + 64;
  }
  BackwardMemory(S* memory, int64_t width, int64_t inner) : ldx(padded<S>(width)), ldh(padded<S>(inner)) {
    auto take = [&](int64_t count) { S* at = memory; memory += count; return at; };
    rows = take(B * ldx), x_rows = take(B * ldx), h_rows = take(B * ldh);
    x = take(width * B), grad = take(width * B), dx = take(width * B);
    g = take(inner * B), u = take(inner * B), h = take(inner * B), dh = take(inner * B);
    sum_gate = take(inner * ldx), sum_up = take(inner * ldx), sum_down = take(width * ldh);
  }
};

template <class S> INLINE S row_sum(const S* row, int64_t cols) {
  Vec<S> sum{};
  for (int64_t t = 0; t < cols; t += lanes<S>) sum += load(row + t);
  S total = 0;
  for (int i = 0; i < lanes<S>; ++i) total += sum[i];
  return total;
}

template <class S> INLINE void add_bias(S* to, const S* bias, int64_t rows, int64_t cols, int64_t ld) {
  if (bias)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < cols; t += lanes<S>) store<S>(to + r * ld + t, load(to + r * ld + t) + bias[r]);
}

template <class S> INLINE void sum_bias(S* to, const S* rows, int64_t count, int64_t cols, int64_t ld, bool add) {
  if (to)
    for (int64_t r = 0; r < count; ++r) to[r] = (add ? to[r] : S(0)) + row_sum(rows + r * ld, cols);
}

// The block's part of the gradients of the experts' matrices, summed in `to` [rows, ld].
template <class S>
INLINE void outer(int64_t rows, int64_t cols, int64_t tokens, const S* grad, const S* x, int64_t ldx, S* to, int64_t ld,
                  bool add) {
  matmul<S>(rows, cols, tokens, grad, BackwardMemory<S>::B, 1, x, ldx, to, ld, add);
}

template <class S>
void backward_block(const Call<S>& c, const S* grad_out, int64_t e, const int64_t* pair, int64_t count, bool first,
                    const BackwardMemory<S>& b, const Grads<S>& sum, const Grads<S>& d, S* dx_rows) {
  constexpr int n = lanes<S>;
  constexpr int64_t B = BackwardMemory<S>::B;
  const int64_t l = c.width, m = c.inner, cols = padded<S>(count), at = e * m * l;
  const bool gated = c.gate != nullptr;
  S weight[B] = {}, dweight[B] = {};
  for (int64_t t = 0; t < count; ++t) {
    weight[t] = c.weights[pair[t]];
    copy_row<S>(c.hidden + pair[t] / c.k * l, l, c.on_input ? weight[t] : S(1), b.x_rows + t * b.ldx);
    copy_row<S>(grad_out + pair[t] / c.k * l, l, S(1), b.rows + t * b.ldx);
  }
  transpose_to<S>(b.x_rows, b.ldx, count, l, b.x, B);
  transpose_to<S>(b.rows, b.ldx, count, l, b.grad, B);
  matmul<S>(m, cols, l, c.up + at, l, 1, b.x, B, b.u, B, false);
  add_bias<S>(b.u, c.up_bias ? c.up_bias + e * m : nullptr, m, cols, B);
  if (gated) {
    matmul<S>(m, cols, l, c.gate + at, l, 1, b.x, B, b.g, B, false);
    add_bias<S>(b.g, c.gate_bias ? c.gate_bias + e * m : nullptr, m, cols, B);
  }
  matmul<S>(m, cols, l, c.down + at, 1, m, b.grad, B, b.dh, B, false);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t t = 0; t < cols; t += n) {
      const int64_t i = j * B + t;
      Vec<S> raw = load(b.dh + i), w = load(weight + t), g = gated ? load(b.g + i) : Vec<S>{}, u = load(b.u + i);
      Vec<S> h = activate_backward<S>(c.activation, gated, c.on_input ? raw : raw * w, g, u);
      store<S>(dweight + t, load(dweight + t) + raw * h);
      if (gated) store<S>(b.g + i, g);
      store<S>(b.u + i, u);
      store<S>(b.h + i, h);
    }
  for (int64_t i = 0; i < l; ++i)
    for (int64_t t = 0; t < cols; t += n) {
      Vec<S> raw = load(b.grad + i * B + t);
      if (c.down_bias) store<S>(dweight + t, load(dweight + t) + raw * c.down_bias[e * l + i]);
      if (!c.on_input) store<S>(b.grad + i * B + t, raw * load(weight + t));
    }
  matmul<S>(l, cols, m, c.up + at, 1, l, b.u, B, b.dx, B, false);
  if (gated) matmul<S>(l, cols, m, c.gate + at, 1, l, b.g, B, b.dx, B, true);
  transpose_to<S>(b.dx, B, l, count, b.rows, b.ldx);
  for (int64_t t = 0; t < count; ++t) {
    const S* row = b.rows + t * b.ldx;
    copy_row<S>(row, l, c.on_input ? weight[t] : S(1), dx_rows + pair[t] * b.ldx);
    if (c.on_input) {
      S dot = 0;
      for (int64_t i = 0; i < l; ++i) dot += row[i] * c.hidden[pair[t] / c.k * l + i];
      dweight[t] = dot;
    }
    d.weights[pair[t]] = dweight[t];
  }
  if (!d.up) return;
  transpose_to<S>(b.h, B, m, count, b.h_rows, b.ldh);
  const int64_t ldx = l % n ? b.ldx : l, ldh = m % n ? b.ldh : m;
  if (gated) outer<S>(m, b.ldx, count, b.g, b.x_rows, b.ldx, sum.gate, ldx, !first);
  outer<S>(m, b.ldx, count, b.u, b.x_rows, b.ldx, sum.up, ldx, !first);
  outer<S>(l, b.ldh, count, b.grad, b.h_rows, b.ldh, sum.down, ldh, !first);
  sum_bias<S>(d.gate_bias ? d.gate_bias + e * m : nullptr, b.g, m, cols, B, !first);
  sum_bias<S>(d.up_bias ? d.up_bias + e * m : nullptr, b.u, m, cols, B, !first);
  sum_bias<S>(d.down_bias ? d.down_bias + e * l : nullptr, b.grad, l, cols, B, !first);
}

template <class S> void fill_zero(S* to, int64_t e, int64_t size) {
  if (to) std::memset(to + e * size, 0, size * sizeof(S));
}

template <class S>
void backward_expert(const Call<S>& c, const S* grad_out, int64_t e, const int64_t* pair, int64_t count, S* memory,
                     const Grads<S>& d, S* dx_rows) {
  const int64_t l = c.width, m = c.inner, n = lanes<S>;
  if (!count) {
    fill_zero(d.gate, e, m * l), fill_zero(d.up, e, m * l), fill_zero(d.down, e, m * l);
    fill_zero(d.gate_bias, e, m), fill_zero(d.up_bias, e, m), fill_zero(d.down_bias, e, l);
    return;
  }
  BackwardMemory<S> b(memory, l, m);
  Grads<S> sum{};
  if (d.up) {
    sum.gate = l % n || !d.gate ? b.sum_gate : d.gate + e * m * l;
    sum.up = l % n ? b.sum_up : d.up + e * m * l;
    sum.down = m % n ? b.sum_down : d.down + e * m * l;
  }
  for (int64_t at = 0; at < count; at += b.B)
    backward_block<S>(c, grad_out, e, pair + at, std::min<int64_t>(b.B, count - at), at == 0, b, sum, d, dx_rows);
  if (!d.up) return;
  for (int64_t j = 0; j < m && l % n; ++j) {
    if (d.gate) std::memcpy(d.gate + (e * m + j) * l, sum.gate + j * b.ldx, l * sizeof(S));
    std::memcpy(d.up + (e * m + j) * l, sum.up + j * b.ldx, l * sizeof(S));
  }
  for (int64_t i = 0; i < l && m % n; ++i)
    std::memcpy(d.down + (e * l + i) * m, sum.down + i * b.ldh, m * sizeof(S));
}

template <class S> int backward(const Call<S>& c, const S* grad_out, const Grads<S>& d, int threads) {
  const int64_t pairs = c.tokens * c.k, ld = padded<S>(c.width);
  const int64_t per_thread = (BackwardMemory<S>::elements(c.width, c.inner) + 15) / 16 * 16;
  const size_t ints = (2 * c.experts + 2 + pairs) * sizeof(int64_t), head = (ints + 63) / 64 * 64;
  char* memory = scratch.reserve(head + (pairs * ld + threads * per_thread) * sizeof(S));
  if (!memory) return 2;
  int64_t* numbers = reinterpret_cast<int64_t*>(memory);
  Sorted sorted{numbers, numbers + c.experts + 2};
  int64_t* order = sorted.pair + pairs;
  if (sort_pairs(c.indices, pairs, c.experts, sorted) < 0) return 1;
  for (int64_t e = 0; e < c.experts; ++e) order[e] = e;
  auto count = [&](int64_t e) { return sorted.begin[e + 1] - sorted.begin[e]; };
  std::stable_sort(order, order + c.experts, [&](int64_t a, int64_t b) { return count(a) > count(b); });
  S *dx_rows = reinterpret_cast<S*>(memory + head), *local = dx_rows + pairs * ld;
  std::memset(d.weights, 0, pairs * sizeof(S));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    S* mine = local + thread_number() * per_thread;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < c.experts; ++item) {
      const int64_t e = order[item];
      backward_expert<S>(c, grad_out, e, sorted.pair + sorted.begin[e], count(e), mine, d, dx_rows);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < c.tokens; ++t)
      combine<S, S>(c.indices, t, c.k, c.experts, c.width, dx_rows, ld, d.hidden);
  }
  scratch.trim();
  return 0;
}

}  // namespace

// A whole block for a few tokens in one region of threads: routing, down-projection, experts, sum, up-projection.

#pragma once

#include "kernels_native_forward.h"
#include "kernels_native_route.h"

namespace {

// What a block holds; absent tensors are null. Filled in by block_native.py, which knows these by the order of their fields.
struct RouterPlan {
  const void *weight, *bias, *selection_bias, *expert_scale;  // [rows, d], [rows] of type S if `wide`, else W; [rows] S
  int64_t k, rows, width, wide, score, normalize, topk_first, bias_on_logit;
  double softcap, eps, scale;  // softcap 0: none
};
struct ExpertsPlan {
  const void *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
  const void *latent_down, *latent_up, *output_bias;  // [l, d], [d, l], [d]
  int64_t width, n, latent, inner, on_input, activation;
  int64_t identity;  // expert numbers past n that return their input
  double alpha, gate_min, gate_max, up_min, up_max, up_offset, output_scale;
};

// What goes in and comes out beside hidden states: given experts and weights; logits, weights and experts that are wanted.
struct Others {
  int64_t k;
  const int64_t* indices;  // [T, k]
  const void* weights;     // [T, k]
  void *logits, *chosen_weights;  // [T, rows], [T, k]
  int64_t* chosen;                // [T, k]
};

// One call. Without a router, experts and weights are given; without experts, only the routing is wanted.
template <class S, class W> struct Block {
  Call<W> experts;  // hidden is [T, d]
  int64_t width;    // d
  const W* seen;    // [T, d], what the router reads
  const RouterPlan& router;
  const ExpertsPlan& plan;
  S *logits, *weights;
  int64_t* indices;
  W* out;  // [T, d]
};

template <class S, class W>
Block<S, W> block_of(int64_t tokens, const void* hidden, const void* seen, const RouterPlan* router,
                     const ExpertsPlan* experts, void* out, const Others* others) {
  static const RouterPlan no_router{};
  static const ExpertsPlan no_experts{};
  static const Others nothing{};
  const RouterPlan& r = router ? *router : no_router;
  const ExpertsPlan& e = experts ? *experts : no_experts;
  const Others& o = others ? *others : nothing;
  auto at = [](const void* p) { return static_cast<const W*>(p); };
  return {{tokens, router ? r.k : o.k, e.n, e.latent, e.inner, at(hidden), at(o.weights), at(e.gate), at(e.up), at(e.down),
           at(e.gate_bias), at(e.up_bias), at(e.down_bias), o.indices, e.on_input != 0,
           {int32_t(e.activation), e.alpha, e.gate_min, e.gate_max, e.up_min, e.up_max, e.up_offset}},
          router ? r.width : e.width, at(seen), r, e, static_cast<S*>(o.logits), static_cast<S*>(o.chosen_weights), o.chosen,
          static_cast<W*>(out)};
}

// to[t][row] for rows [first, last) of weight [., k] times each of x [tokens, ld].
template <class S, class W, int nt>
void rows_times(const W* weight, int64_t k, int64_t first, int64_t last, const S* const* x, int64_t tokens, S* to, int64_t ldt) {
  constexpr int nr = lanes<S> / nt;
  for (int64_t j = first; j < last; j += nr) {
    const int64_t rows = std::min<int64_t>(nr, last - j);
    Vec<S> sum = dots<S, W, nt>(weight + j * k, k, x, rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < std::min<int64_t>(nt, tokens); ++t) to[t * ldt + j + r] = sum[r * nt + t];
  }
}
template <class S, class W>
void rows_times(const W* weight, int64_t k, int64_t first, int64_t last, const S* x, int64_t ld, int64_t tokens, S* to, int64_t ldt) {
  in_groups<S>(tokens, [&](auto nt, int64_t at) {
    const S* from[nt.value];
    for (int t = 0; t < nt.value; ++t) from[t] = x + std::min(at + t, tokens - 1) * ld;
    rows_times<S, W, nt.value>(weight, k, first, last, from, tokens - at, to + at * ldt, ldt);
  });
}

template <class S, class W> int block(const Block<S, W>& b, int threads) {
  constexpr int64_t ROWS = lanes<S>;  // of a projection, at a time
  Call<W> c = b.experts;
  const RouterPlan& r = b.router;
  const ExpertsPlan& e = b.plan;
  const W *down = static_cast<const W*>(e.latent_down), *up = static_cast<const W*>(e.latent_up);
  const W *output_bias = static_cast<const W*>(e.output_bias);
  const Rule<S> rule{r.rows, c.k, int32_t(r.score), int32_t(r.normalize), r.topk_first != 0, r.bias_on_logit != 0,
                     S(r.softcap), S(r.eps), S(r.scale), static_cast<const S*>(r.selection_bias),
                     static_cast<const S*>(r.expert_scale)};
  const int64_t tokens = c.tokens, pairs = tokens * c.k, n = r.rows, latent = down ? c.width : 0;
  const int64_t ldx = padded<S>(b.width), ld = padded<S>(c.width), ldh = padded<S>(c.inner);
  threads = worth(tokens * b.width * (n + 2 * latent) + pairs * c.width * c.inner * (c.gate ? 3 : 2), threads);
  const int64_t per_thread = (FEW + tokens) * ld;
  const size_t ints = (c.experts + 2 + 4 * pairs + n) * sizeof(int64_t) + pairs * sizeof(Work);
  const size_t halves = (tokens * c.width + pairs) * sizeof(W);
  const size_t values = (tokens * (3 * ldx + ld) + tokens * n + 2 * n + pairs * (1 + ldh + ld) + threads * per_thread) * sizeof(S);
  char* memory = scratch.reserve((ints + 63) / 64 * 64 + (values + 63) / 64 * 64 + halves);
  if (!memory) return 2;
  int64_t* number = reinterpret_cast<int64_t*>(memory);
  const auto take = [](auto*& from, int64_t count) { auto* taken = from; from += count; return taken; };
  Sorted sorted{take(number, c.experts + 2), take(number, pairs)};
  int64_t *row_of = take(number, pairs), *chosen = take(number, pairs), *order = take(number, n);
  Work* work = reinterpret_cast<Work*>(number);
  S* value = reinterpret_cast<S*>(memory + (ints + 63) / 64 * 64);
  S *x = take(value, tokens * ldx), *seen = b.seen == c.hidden ? x : take(value, tokens * ldx);
  S *logits = b.logits ? b.logits : take(value, tokens * n), *choices = take(value, 2 * n), *weighed = take(value, pairs);
  S *sums = take(value, tokens * ld), *output = take(value, tokens * ldx);
  S *h = take(value, pairs * ldh), *y = take(value, pairs * ld), *local = take(value, threads * per_thread);
  W *z = reinterpret_cast<W*>(memory + (ints + 63) / 64 * 64 + (values + 63) / 64 * 64), *narrowed = z + tokens * c.width;

  for (int64_t t = 0; t < tokens; ++t) {
    copy_row<S>(c.hidden + t * b.width, b.width, S(1), x + t * ldx);
    if (seen != x) copy_row<S>(b.seen + t * b.width, b.width, S(1), seen + t * ldx);
  }
  const auto project = [&](int64_t item) {  // the router's rows, then the down-projection's
    const int64_t first = item * ROWS, split = padded<S>(n);
    if (first < split) {
      const int64_t last = std::min(n, first + ROWS);
      const W *weight = static_cast<const W*>(r.weight), *bias = static_cast<const W*>(r.bias);
      const S *wide = static_cast<const S*>(r.weight), *wide_bias = static_cast<const S*>(r.bias);
      if (r.wide) rows_times<S>(wide, b.width, first, last, seen, ldx, tokens, logits, n);
      else rows_times<S>(weight, b.width, first, last, seen, ldx, tokens, logits, n);
      for (int64_t t = 0; bias && t < tokens; ++t)
        for (int64_t row = first; row < last; ++row) logits[t * n + row] += r.wide ? wide_bias[row] : widen(bias[row]);
    } else {
      const int64_t last = std::min(latent, first - split + ROWS);
      rows_times<S>(down, b.width, first - split, last, x, ldx, tokens, sums, ld);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t row = first - split; row < last; ++row) z[t * latent + row] = narrow<W>(sums[t * ld + row]);
    }
  };
  int code = 0;
  if (down) c.hidden = z;
  if (r.weight) {
    c.indices = chosen;
    c.weights = narrowed;
  }
  Small<S, W> few{c, sorted.pair, work, row_of, 0, 1, h, y};
  const auto choose = [&](int64_t) {
    for (int64_t t = 0; r.weight && t < tokens; ++t)
      select(rule, logits + t * n, choices, order, chosen + t * c.k, weighed + t * c.k);
    for (int64_t p = 0; r.weight && p < pairs; ++p) {
      narrowed[p] = narrow<W>(weighed[p]);
      if (b.indices) b.indices[p] = chosen[p];
      if (b.weights) b.weights[p] = weighed[p];
    }
    if (!b.out) return;
    if (sort_pairs(c.indices, pairs, c.experts, sorted) < 0) {
      code = 1;
      return;
    }
    for (int64_t expert = 0; expert < c.experts; ++expert)
      for (int64_t at = sorted.begin[expert]; at < sorted.begin[expert + 1]; at += FEW) {
        row_of[few.count] = at;
        work[few.count++] = {expert, at, std::min<int64_t>(FEW, sorted.begin[expert + 1] - at)};
      }
    few.cuts = cuts_of(few.count, 0, c.inner, threads);
  };
  // One element of the output from the sum of a token's experts.
  const auto put = [&](int64_t t, int64_t row, S sum) {
    if (e.identity) {
      S passed = 0;
      for (int64_t p = t * c.k; p < (t + 1) * c.k; ++p)
        if (c.indices[p] >= c.experts) passed += widen(c.weights[p]);
      sum += x[t * ldx + row] * passed;
    }
    sum *= S(e.output_scale);
    b.out[t * b.width + row] = narrow<W>(output_bias ? sum + widen(output_bias[row]) : sum);
  };
  Phase projecting, choosing, half, other_half, finishing;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    S *mine = local + thread_number() * per_thread, *total = mine + FEW * ld;
    projecting.run((padded<S>(n) + padded<S>(latent)) / ROWS, project);
    choosing.run(1, choose);
    if (b.out && !code) {
      few.run(half, other_half, mine);
      // Each thread sums for itself what its rows of the up-projection read.
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < c.width; ++i) {
          S sum = 0;
          for (int64_t p = t * c.k; p < (t + 1) * c.k; ++p)
            if (c.indices[p] < c.experts) sum += y[p * ld + i];
          total[t * ld + i] = widen(narrow<W>(sum));
        }
      finishing.take(ldx / ROWS, [&](int64_t item) {
        const int64_t first = item * ROWS, last = std::min(b.width, first + ROWS);
        const S* from = total;
        int64_t ldf = ld;
        if (up) {
          rows_times<S>(up, c.width, first, last, total, ld, tokens, output, ldx);
          from = output, ldf = ldx;
        }
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t row = first; row < last; ++row) put(t, row, from[t * ldf + row]);
      });
    }
  }
  scratch.trim();
  return code;
}

}  // namespace

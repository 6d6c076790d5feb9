// The routing function of latentize/routing.py for one token at a time, without groups and p-norms.

#pragma once

#include <cmath>
#include "kernels_native_vectors.h"

namespace {

enum Score { SOFTMAX, SIGMOIDAL, SQRT_SOFTPLUS };
enum Normalize { UNDIVIDED, BY_SUM, BY_CLAMPED_SUM };

template <class S> struct Rule {
  int64_t experts, k;
  int32_t score, normalize;
  bool topk_first, bias_on_logit;
  S softcap, eps, scale;  // softcap 0: none
  const S *selection_bias, *expert_scale;  // [experts] or null
};

// z[count] becomes its scores.
template <class S> void score(int32_t kind, int64_t count, S* z) {
  if (kind == SOFTMAX) {
    S most = z[0], total = 0;
    for (int64_t i = 1; i < count; ++i) most = z[i] > most || z[i] != z[i] ? z[i] : most;
    for (int64_t i = 0; i < count; ++i) total += z[i] = std::exp(z[i] - most);
    for (int64_t i = 0; i < count; ++i) z[i] /= total;
  } else if (kind == SIGMOIDAL) {
    for (int64_t i = 0; i < count; ++i) z[i] = S(1) / (S(1) + std::exp(-z[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) z[i] = std::sqrt(z[i] > S(20) ? z[i] : std::log1p(std::exp(z[i])));
  }
}

// indices and weights [k], largest first, from logits [experts]; memory holds 2 * experts S and as many int64 as experts.
// Of equal choices the first expert is taken; NaN is taken before all else, and passes through.
template <class S> void select(const Rule<S>& r, const S* logits, S* memory, int64_t* order, int64_t* indices, S* weights) {
  const int64_t n = r.experts, k = r.k;
  S *scores = memory, *choice = memory + n;
  for (int64_t i = 0; i < n; ++i) scores[i] = r.softcap != S(0) ? r.softcap * std::tanh(logits[i] / r.softcap) : logits[i];
  for (int64_t i = 0; i < n; ++i) choice[i] = scores[i];
  if (!r.topk_first) {
    score(r.score, n, scores);
    if (!r.bias_on_logit)
      for (int64_t i = 0; i < n; ++i) choice[i] = scores[i];
  }
  if (r.selection_bias)
    for (int64_t i = 0; i < n; ++i) choice[i] += r.selection_bias[i];
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::partial_sort(order, order + k, order + n, [choice](int64_t a, int64_t b) {
    const S x = choice[a], y = choice[b];
    if (x != x || y != y) return x != x && (y == y || a < b);
    return x > y || (x == y && a < b);
  });
  for (int64_t i = 0; i < k; ++i) weights[i] = scores[indices[i] = order[i]];
  if (r.topk_first) score(r.score, k, weights);
  S total = 0;
  for (int64_t i = 0; i < k; ++i) total += weights[i];
  const S divisor = r.normalize == BY_SUM ? total + r.eps : r.normalize == BY_CLAMPED_SUM && total < r.eps ? r.eps : total;
  for (int64_t i = 0; i < k; ++i) {
    if (r.normalize != UNDIVIDED) weights[i] /= divisor;
    weights[i] *= r.scale;
    if (r.expert_scale) weights[i] *= r.expert_scale[indices[i]];
  }
}

}  // namespace

// The expert non-linearities of latentize/activations.py and their derivatives, on vectors.

#pragma once

#include <cmath>
#include "kernels_native_vectors.h"

namespace {

enum Name { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, SIGMOID, TANH, LEAKY_RELU, ELU, SELU, MISH, SOFTPLUS, HARDSWISH,
            RELU6, IDENTITY };

struct Activation {
  int32_t name;
  double alpha, gate_min, gate_max, up_min, up_max, up_offset;  // absent bounds are -inf, inf
  bool bare() const {
    return std::min(gate_max, up_max) == INFINITY && std::max(gate_min, up_min) == -INFINITY && up_offset == 0;
  }
};

INLINE Vec<float> exponential(Vec<float> x) {
  // exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by a polynomial of degree 6 fitted to the least relative error, 3e-9.
  using I = Simd<float>::I;
  x = x > 88.3f ? splat<float>(88.3f) : x;
  x = x < -87.3f ? splat<float>(-87.3f) : x;
  Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec<float> p = splat<float>(1.3814613e-3f);
  p = p * r + 8.3687099e-3f;
  p = p * r + 4.1668387e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999993e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I bits = ((I)shifted << 23) + (127 << 23);
  return p * (Vec<float>)bits;
}
INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
template <class S> INLINE Vec<S> logistic(Vec<S> x) { return S(1) / (S(1) + exponential(-x)); }

// Φ(x), the standard normal distribution: erfc(z) = exp(-z²) Q(1 / (1 + z/2)), Q fitted to 4e-8.
INLINE Vec<float> normal(Vec<float> x) {
  static const float q[] = {0.25539568552f, 0.42718592940f, 0.24165766545f, 0.07897620322f, 0.00373774422f,
                            -0.00698019417f, -0.00086397522f, 0.00093318388f, 7.2592826517e-05f, -1.1487712470e-04f};
  Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f;
  Vec<float> u = 2.0f / (1.0f + 0.5f * z) - 1.0f, p = splat<float>(q[9]);
#pragma GCC unroll 9
  for (int i = 8; i >= 0; --i) p = p * u + q[i];
  Vec<float> tail = 0.5f * p * exponential(-z * z);
  return x < 0.0f ? tail : 1.0f - tail;
}
INLINE Vec<double> normal(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

// The less common functions, one element at a time: value and derivative.
inline double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
inline double scalar_value(int name, double x) {
  switch (name) {
    case TANH: return std::tanh(x);
    case LEAKY_RELU: return x > 0 ? x : 0.01 * x;
    case ELU: return x > 0 ? x : std::expm1(x);
    case SELU: return 1.0507009873554804934 * (x > 0 ? x : 1.6732632423543772848 * std::expm1(x));
    case MISH: return x * std::tanh(softplus(x));
    case SOFTPLUS: return softplus(x);
    case HARDSWISH: return x * (x < -3 ? 0 : x > 3 ? 6 : x + 3) / 6;
    default: return x < 0 ? 0 : x > 6 ? 6 : x;
  }
}
inline double scalar_slope(int name, double x) {
  switch (name) {
    case TANH: { double t = std::tanh(x); return 1 - t * t; }
    case LEAKY_RELU: return x > 0 ? 1 : 0.01;
    case ELU: return x > 0 ? 1 : std::exp(x);
    case SELU: return 1.0507009873554804934 * (x > 0 ? 1 : 1.6732632423543772848 * std::exp(x));
    case MISH: { double t = std::tanh(softplus(x)); return t + x * (1 - t * t) / (1 + std::exp(-x)); }
    case SOFTPLUS: return x > 20 ? 1 : 1 / (1 + std::exp(-x));
    case HARDSWISH: return x < -3 ? 0 : x <= 3 ? x / 3 + 0.5 : 1;
    default: return x > 0 && x < 6 ? 1 : x != x ? x : 0;
  }
}

constexpr double GELU_CUBE = 0.044715, GELU_ROOT = 0.79788456080286535588;

template <class S> INLINE Vec<S> value(const Activation& a, Vec<S> x) {
  const Vec<S> zero{};
  switch (a.name) {
    case SILU: return x * logistic<S>(S(a.alpha) * x);
    case GELU: return x * normal(x);
    case GELU_TANH: return x * logistic<S>(S(2 * GELU_ROOT) * (x + S(GELU_CUBE) * x * x * x));
    case RELU: return x <= S(0) ? zero : x;
    case RELU_SQUARED: x = x <= S(0) ? zero : x; return x * x;
    case SIGMOID: return logistic<S>(x);
    case IDENTITY: return x;
  }
  for (int i = 0; i < lanes<S>; ++i) x[i] = S(scalar_value(a.name, double(x[i])));
  return x;
}

template <class S> INLINE Vec<S> slope(const Activation& a, Vec<S> x) {
  const Vec<S> zero{}, one = splat<S>(1);
  switch (a.name) {
    case SILU: { Vec<S> s = logistic<S>(S(a.alpha) * x); return s * (S(1) + S(a.alpha) * x * (S(1) - s)); }
    case GELU: return normal(x) + x * S(0.39894228040143267794) * exponential(S(-0.5) * x * x);
    case GELU_TANH: {
      Vec<S> s = logistic<S>(S(2 * GELU_ROOT) * (x + S(GELU_CUBE) * x * x * x));
      return s + x * s * (S(1) - s) * S(2 * GELU_ROOT) * (S(1) + S(3 * GELU_CUBE) * x * x);
    }
    case RELU: return x <= S(0) ? zero : one;
    case RELU_SQUARED: return x <= S(0) ? zero : x + x;
    case SIGMOID: { Vec<S> s = logistic<S>(x); return s * (S(1) - s); }
    case IDENTITY: return one;
  }
  for (int i = 0; i < lanes<S>; ++i) x[i] = S(scalar_slope(a.name, double(x[i])));
  return x;
}

template <class S> INLINE Vec<S> clamp(Vec<S> x, double low, double high) {
  x = x < S(low) ? splat<S>(S(low)) : x;  // a NaN compares false and stays
  return x > S(high) ? splat<S>(S(high)) : x;
}
template <class S> INLINE Vec<S> inside(Vec<S> grad, Vec<S> x, double low, double high) {
  const Vec<S> zero{};
  grad = x < S(low) ? zero : grad;
  return x > S(high) ? zero : grad;
}

template <class S> INLINE Vec<S> activate(const Activation& a, bool gated, Vec<S> g, Vec<S> u) {
  Vec<S> active = value<S>(a, clamp<S>(gated ? g : u, a.gate_min, a.gate_max));
  return gated ? active * (clamp<S>(u, a.up_min, a.up_max) + S(a.up_offset)) : active;
}

template <class S, int name> void activate_bare(double alpha, bool gated, const S* g, const S* u, S* to, int64_t count) {
  const Activation known{name, alpha, 0, 0, 0, 0, 0};
  for (int64_t i = 0; i < count; i += lanes<S>) {
    const Vec<S> active = value<S>(known, load((gated ? g : u) + i));
    store<S>(to + i, gated ? active * load(u + i) : active);
  }
}
// `activate` on `count` elements, a multiple of the lanes. The common functions, which need neither bounds nor offset, have
// loops of their own: looking all that up for every vector takes longer than the function.
template <class S> void activate_all(const Activation& a, bool gated, const S* g, const S* u, S* to, int64_t count) {
  switch (a.bare() ? a.name : -1) {
    case SILU: return activate_bare<S, SILU>(a.alpha, gated, g, u, to, count);
    case GELU: return activate_bare<S, GELU>(a.alpha, gated, g, u, to, count);
    case GELU_TANH: return activate_bare<S, GELU_TANH>(a.alpha, gated, g, u, to, count);
    case RELU: return activate_bare<S, RELU>(a.alpha, gated, g, u, to, count);
    case RELU_SQUARED: return activate_bare<S, RELU_SQUARED>(a.alpha, gated, g, u, to, count);
  }
  for (int64_t i = 0; i < count; i += lanes<S>)
    store<S>(to + i, activate<S>(a, gated, gated ? load(g + i) : Vec<S>{}, load(u + i)));
}

// In: pre-activations g, u and grad of the hidden activation. Out: their gradients in g, u; the activation.
template <class S> INLINE Vec<S> activate_backward(const Activation& a, bool gated, Vec<S> grad, Vec<S>& g, Vec<S>& u) {
  Vec<S> raw = gated ? g : u, inner = clamp<S>(raw, a.gate_min, a.gate_max);
  Vec<S> active = value<S>(a, inner), d = slope<S>(a, inner);
  if (!gated) {
    u = inside<S>(grad * d, raw, a.gate_min, a.gate_max);
    return active;
  }
  Vec<S> linear = clamp<S>(u, a.up_min, a.up_max) + S(a.up_offset);
  g = inside<S>(grad * linear * d, raw, a.gate_min, a.gate_max);
  u = inside<S>(grad * active, u, a.up_min, a.up_max);
  return active * linear;
}

}  // namespace

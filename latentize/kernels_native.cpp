// The routed experts on CPU: one fused pass over the weights of the experts that were hit.
//
// Pairs (token, slot) are sorted by expert. An expert with few tokens is computed as dot products along its rows; one
// with many as matrix products on blocks of tokens laid out [width][tokens], so that weights are read where they lie and
// broadcast: nothing is packed. Every output is summed in the order of the slots, whatever the number of threads.
//
// S is the arithmetic type (float, double), W the storage type (S, bf16, fp16). Compiled on demand by kernels_native.py.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

struct bf16 { uint16_t bits; };
using fp16 = _Float16;

// ---------------------------------------------------------------------------------------------------- vectors

template <class S> struct Simd;
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef float U __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int n = VECTOR_BYTES / 4;
};
template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef double U __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int n = VECTOR_BYTES / 8;
};
template <class S> using Vec = typename Simd<S>::V;
template <class S> constexpr int lanes = Simd<S>::n;

template <class S> INLINE Vec<S> load(const S* p) { return *reinterpret_cast<const typename Simd<S>::U*>(p); }
template <class S> INLINE void store(S* p, Vec<S> v) { *reinterpret_cast<typename Simd<S>::U*>(p) = v; }
template <class S> INLINE Vec<S> splat(S x) { return Vec<S>{} + x; }

typedef uint16_t Half __attribute__((vector_size(2 * lanes<float>), aligned(2), may_alias));
typedef fp16 HalfFloat __attribute__((vector_size(2 * lanes<float>), aligned(2), may_alias));
typedef uint32_t Word __attribute__((vector_size(VECTOR_BYTES)));
INLINE Vec<float> load(const bf16* p) {
  Word w = __builtin_convertvector(*reinterpret_cast<const Half*>(p), Word) << 16;
  return (Vec<float>)w;  // the same bits
}
INLINE Vec<float> load(const fp16* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfFloat*>(p), Vec<float>);
}
INLINE float widen(bf16 x) { uint32_t w = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &w, 4); return f; }
INLINE float widen(fp16 x) { return float(x); }
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
template <class W> INLINE W narrow(float x) { return W(x); }
template <class W> INLINE W narrow(double x) { return W(x); }
template <> INLINE bf16 narrow<bf16>(float x) {
  if (x != x) return bf16{0x7fc0};
  uint32_t w; std::memcpy(&w, &x, 4);
  return bf16{uint16_t((w + 0x7fff + ((w >> 16) & 1)) >> 16)};
}

// The last count < lanes elements, zeros behind them.
template <class S, class W> INLINE Vec<S> load_tail(const W* p, int count) {
  W lane[lanes<S>] = {};
  std::memcpy(static_cast<void*>(lane), p, count * sizeof(W));
  return load(lane);
}

template <class S, int s, bool high, size_t... j>
INLINE Vec<S> exchange(Vec<S> a, Vec<S> b, std::index_sequence<j...>) {
  constexpr int n = lanes<S>;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (high ? ((j & s) ? int(j) + n : int(j) + s) : ((j & s) ? int(j) - s + n : int(j)))...);
#else
  using L = decltype(typename Simd<S>::I{}[0] + 0);
  return __builtin_shuffle(a, b, typename Simd<S>::I{L(high ? ((j & s) ? int(j) + n : int(j) + s) : ((j & s) ? int(j) - s + n : int(j)))...});
#endif
}
template <class S, int s> INLINE Vec<S> low_half(Vec<S> a, Vec<S> b) {
  return exchange<S, s, false>(a, b, std::make_index_sequence<lanes<S>>{});
}
template <class S, int s> INLINE Vec<S> high_half(Vec<S> a, Vec<S> b) {
  return exchange<S, s, true>(a, b, std::make_index_sequence<lanes<S>>{});
}

template <class S, int s> INLINE void transpose(Vec<S>* r) {
  if constexpr (s > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes<S>; ++i)
      if (!(i & s)) {
        Vec<S> a = r[i], b = r[i + s];
        r[i] = low_half<S, s>(a, b);
        r[i + s] = high_half<S, s>(a, b);
      }
    transpose<S, s / 2>(r);
  }
}

// Lane j of the result is the sum of the lanes of r[j].
template <class S, int s> INLINE Vec<S> sums(Vec<S>* r) {
  if constexpr (s > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < s; ++i) {
      Vec<S> a = r[i], b = r[i + s];
      r[i] = low_half<S, s>(a, b) + high_half<S, s>(a, b);
    }
    return sums<S, s / 2>(r);
  } else {
    return r[0];
  }
}

// to[c][r] = from[r][c] for rows x cols; `to` has room for whole vectors of rows, filled with zeros past `rows`.
template <class S> void transpose_to(const S* from, int64_t ldf, int64_t rows, int64_t cols, S* to, int64_t ldt) {
  constexpr int n = lanes<S>;
  for (int64_t r = 0; r < rows; r += n)
    for (int64_t c = 0; c < cols; c += n) {
      int nr = int(std::min<int64_t>(n, rows - r)), nc = int(std::min<int64_t>(n, cols - c));
      Vec<S> block[n];
      if (nr == n && nc == n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) block[i] = load(from + (r + i) * ldf + c);
      } else {
        for (int i = 0; i < n; ++i) block[i] = i < nr ? load_tail<S>(from + (r + i) * ldf + c, nc) : Vec<S>{};
      }
      transpose<S, n / 2>(block);
      for (int i = 0; i < nc; ++i) store(to + (c + i) * ldt + r, block[i]);
    }
}

// ------------------------------------------------------------------------------------------------ activations

enum Name { SILU, GELU, GELU_TANH, RELU, RELU_SQUARED, SIGMOID, TANH, LEAKY_RELU, ELU, SELU, MISH, SOFTPLUS, HARDSWISH,
            RELU6, IDENTITY };

struct Activation {
  int32_t name;
  double alpha, gate_min, gate_max, up_min, up_max, up_offset;  // absent bounds are -inf, inf
};

INLINE Vec<float> exponential(Vec<float> x) {
  // exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by the Taylor polynomial of degree 7 (remainder 6e-9).
  using I = Simd<float>::I;
  x = x > 88.3f ? splat<float>(88.3f) : x;
  x = x < -87.3f ? splat<float>(-87.3f) : x;
  Vec<float> shifted = x * 1.44269504f + 12582912.0f;
  Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693145752f - n * 1.42860677e-6f;
  Vec<float> p = splat<float>(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
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

// -------------------------------------------------------------------------------------------- matrix products

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
  if constexpr (TILE == 8)
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

// -------------------------------------------------------------------------------------------------- arguments

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

INLINE int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One hidden row, scaled, widened, zeros up to `padded(width)`.
template <class S, class W> void copy_row(const W* from, int64_t width, S scale, S* to) {
  constexpr int n = lanes<S>;
  int64_t i = 0;
  for (; i + n <= width; i += n) store<S>(to + i, scale * load(from + i));
  if (i < width) store<S>(to + i, scale * load_tail<S>(from + i, int(width - i)));
}

// out[T, width] = sum over each token's pairs, in the order of the slots; pairs of absent experts are skipped.
template <class S, class W>
void combine(const int64_t* indices, int64_t tokens, int64_t k, int64_t experts, int64_t width, const S* rows, int64_t ld,
             W* out) {
  constexpr int n = lanes<S>;
#pragma omp for schedule(static)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < width; i += n) {
      Vec<S> sum{};
      for (int64_t s = t * k; s < (t + 1) * k; ++s)
        if (indices[s] < experts) sum += load(rows + s * ld + i);
      for (int64_t j = 0; j < std::min<int64_t>(n, width - i); ++j) out[t * width + i + j] = narrow<W>(sum[j]);
    }
}

// ---------------------------------------------------------------------------------- forward, few tokens per expert

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

// --------------------------------------------------------------------------------- forward, many tokens per expert

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

// ---------------------------------------------------------------------------------------------------- forward

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

// --------------------------------------------------------------------------------------------------- backward

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
    combine<S, S>(c.indices, c.tokens, c.k, c.experts, c.width, dx_rows, ld, d.hidden);
  }
  scratch.trim();
  return 0;
}

template <class W> Call<W> call_of(const int64_t* sizes, const void* const* in, const double* scalars) {
  auto at = [&](int i) { return static_cast<const W*>(in[i]); };
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], at(0), at(2), at(3), at(4), at(5), at(6), at(7), at(8),
          static_cast<const int64_t*>(in[1]), sizes[5] != 0,
          {int32_t(sizes[6]), scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5]}};
}

}  // namespace

// sizes: T, k, N, l, m, weights on the input, activation. in: hidden, indices, weights, gate, up, down, gate_bias, up_bias,
// down_bias. scalars: alpha, gate_min, gate_max, up_min, up_max, up_offset. All tensors contiguous; absent ones null.
// Returns 0, 1 at a negative index, 2 without memory.
#define FORWARD(suffix, S, W)                                                                                         \
  extern "C" int latent_experts_##suffix(const int64_t* sizes, const void* const* in, const double* scalars, void* out, \
                                         int threads) {                                                               \
    return forward<S, W>(call_of<W>(sizes, in, scalars), static_cast<W*>(out), threads);                              \
  }
FORWARD(float32, float, float)
FORWARD(float64, double, double)
FORWARD(bfloat16, float, bf16)
FORWARD(float16, float, fp16)

// in[9] is the gradient of the output. out: gradients of hidden, weights, gate, up, down, gate_bias, up_bias, down_bias.
#define BACKWARD(suffix, S)                                                                                            \
  extern "C" int latent_experts_backward_##suffix(const int64_t* sizes, const void* const* in, const double* scalars,  \
                                                  void* const* out, int threads) {                                     \
    auto at = [&](int i) { return static_cast<S*>(out[i]); };                                                          \
    Grads<S> grads{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};                                            \
    return backward<S>(call_of<S>(sizes, in, scalars), static_cast<const S*>(in[9]), grads, threads);                  \
  }
BACKWARD(float32, float)
BACKWARD(float64, double)

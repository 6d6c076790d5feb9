// Vectors of the machine's width, loads from 16-bit types, transposition and sums across vectors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
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
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfFloat*>(p), Vec<float>);
#endif
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

}  // namespace

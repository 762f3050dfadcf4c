// Vectors of channels and the few functions the kernels need on them.
//
// One source serves every instruction set: W is the number of float32 lanes of the target the
// compiler was asked for, and everything below is written on GCC/Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float a) { return a - vf{}; }

// The first n lanes; the others are zero.
INLINE vf load(const float* p, int n = W) {
  if (n == W) return *(const vf_unaligned*)p;
  vf v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}

INLINE void store(float* p, vf v, int n = W) {
  if (n == W) *(vf_unaligned*)p = v;
  else std::memcpy(p, &v, n * sizeof(float));
}

// Asks for what will be needed soon: rows are far apart, and the hardware does not foresee the next one.
// An address outside the tensor does no harm.
INLINE void prefetch(const float* p) { __builtin_prefetch(p, 0, 2); }
INLINE void prefetch_row(const float* p, int64_t vectors) {
  for (int64_t j = 0; j < vectors; ++j) __builtin_prefetch(p + j * W);
}

INLINE vf abs(vf v) { return (vf)((vi)v & 0x7fffffff); }

INLINE bool all(vi mask) {
  bool result = true;
  for (int i = 0; i < W; ++i) result &= mask[i] != 0;
  return result;
}

template <int N>
struct Lanes {
  typedef float vector __attribute__((vector_size(4 * N)));
};

// Sum of the lanes: halves, quarters, ...
template <int N>
INLINE float sum(typename Lanes<N>::vector v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<N / 2>::vector half[2];
    std::memcpy(half, &v, sizeof half);
    return sum<N / 2>(half[0] + half[1]);
  }
}

constexpr float LOG2E = 1.44269504088896340736f;

// p 2^n for p in [1/2, 2], where 2^x is wanted. The power is applied as two factors, which gives 0, denormals,
// inf and NaN where they belong.
INLINE vf scaled(vf p, vi n, vf x) {
  vi half = n >> 1;
  p *= (vf)((half + 127) << 23);
  p *= (vf)((n - half + 127) << 23);
  p = x < splat(-160.0f) ? vf{} : p;
  return x > splat(130.0f) ? splat(__builtin_inff()) : p;
}

// Below, FAST needs -127 <= a b <= 128 and writes the exponent with an integer addition; otherwise the bits
// are the same, and right for all other products. 2^0 is exactly 1. max(a, b) is b if one of them is NaN.

#if defined(__AVX512F__)

INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }

// 2^(i / 16), less i << 19: adding `biased << 19` below completes the power.
alignas(64) constexpr int32_t ROOTS[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

// 2^(a b). Rounding to the nearest sixteenth by adding 1.5 * 2^19 leaves r in [-1/32, 1/32], where the
// degree-3 Taylor polynomial is within 1e-8 (relative), and the root comes from a register.
template <bool FAST>
INLINE vf exp2_product(vf a, vf b) {
  const vf magic = splat(786432.0f);
  vf x = a * b;
  asm("" : "+v"(x));  // else the compiler fuses the product into both sums, on the busier units
  vf biased = x + magic;
  vf r = x - (biased - magic);
  vf p = splat(5.550410866e-2f);
  p = p * r + splat(2.402265070e-1f);
  p = p * r + splat(6.931471806e-1f);
  p = p * r + splat(1.0f);
  vi root = (vi)_mm512_permutexvar_epi32((__m512i)biased, *(const __m512i*)ROOTS);
  if constexpr (FAST) return p * (vf)(root + ((vi)biased << 19));
  p *= (vf)(root + (((vi)biased & 15) << 19));
  return scaled(p, ((vi)biased - (vi)magic) >> 4, x);
}

#else

INLINE vf max(vf a, vf b) { return a > b ? a : b; }

// 2^(a b). Rounding to the nearest integer by adding 1.5 * 2^23 leaves r in [-1/2, 1/2], where the
// degree-5 minimax polynomial with value 1 at 0 is within 1.1e-7 (relative) before rounding.
template <bool FAST>
INLINE vf exp2_product(vf a, vf b) {
  const vf magic = splat(12582912.0f);
  vf biased = a * b + magic;
  vf n = biased - magic;
  vf r = a * b - n;
  vf p = splat(1.326472726e-3f);
  p = p * r + splat(9.671512700e-3f);
  p = p * r + splat(5.550733744e-2f);
  p = p * r + splat(2.402224208e-1f);
  p = p * r + splat(6.931469776e-1f);
  p = p * r + splat(1.0f);
  // The low bits of `biased` are n; those of the magic number itself are zero.
  if constexpr (FAST) return (vf)((vi)p + ((vi)biased << 23));
  return scaled(p, (vi)biased - (vi)magic, a * b);
}

#endif

// 2^x for x <= 128: inf there, 0 or nearly below -126; for a NaN anything.
INLINE vf exp2_bounded(vf x) { return exp2_product<true>(max(splat(-127.0f), x), splat(1.0f)); }

INLINE vf sigmoid(vf x) {
  x *= -LOG2E;
  return 1.0f / (1.0f + exp2_bounded(x > splat(128.0f) ? splat(128.0f) : x));
}

// log(1 + exp(x)) = max(x, 0) + log(1 + u), u = exp(-|x|); log(1 + u) = 2 atanh(s), s = u / (2 + u).
INLINE vf softplus(vf x) {
  vf u = exp2_bounded(abs(x) * -LOG2E);
  vf s = u / (2.0f + u), q = s * s;
  vf p = splat(2.817834616e-1f);
  p = p * q + 2.796060145e-1f;
  p = p * q + 4.002490938e-1f;
  p = p * q + 6.666631699e-1f;
  p = p * q + 2.0f;
  return max(vf{}, x) + p * s;
}

struct Gate {  // silu(z) and its derivative
  vf value, slope;
};

INLINE Gate silu(vf z) {
  vf s = sigmoid(z);
  return {z * s, s * (1.0f + z * (1.0f - s))};
}

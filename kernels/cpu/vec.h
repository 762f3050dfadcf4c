// Vectors of channels and the few functions the kernels need on them.
//
// One source serves every instruction set: W is the number of float32 lanes of the target the
// compiler was asked for, and everything below is written on GCC/Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
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

INLINE vf abs(vf v) { return (vf)((vi)v & 0x7fffffff); }

INLINE bool all(vi mask) {
  bool result = true;
  for (int i = 0; i < W; ++i) result &= mask[i] != 0;
  return result;
}

INLINE float sum(vf v) {  // fixed order: halves, quarters, ...
  float a[W];
  std::memcpy(a, &v, sizeof a);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

constexpr float LOG2E = 1.44269504088896340736f;

// 2^(a b). Rounding to the nearest integer by adding 1.5 * 2^23 leaves r in [-1/2, 1/2], where the
// degree-5 minimax polynomial with value 1 at 0 is within 1.1e-7 (relative) before rounding.
// FAST needs |a b| < 126, and then writes the exponent with an integer addition; otherwise the scale
// is applied as two factors, which gives 0, denormals, inf and NaN where they belong.
template <bool FAST>
INLINE vf exp2_product(vf a, vf b) {
  const vf magic = splat(12582912.0f);
  if constexpr (!FAST) {
    vf x = a * b;
    x = x < splat(-160.0f) ? splat(-160.0f) : x;
    a = x > splat(130.0f) ? splat(130.0f) : x;
    b = splat(1.0f);
  }
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
  vi exponent = (vi)biased - (vi)magic, half = exponent >> 1;
  return p * (vf)((half + 127) << 23) * (vf)((exponent - half + 127) << 23);
}

INLINE vf exp(vf x) { return exp2_product<false>(x, splat(LOG2E)); }

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|); log1p(u) = 2 atanh(u / (2 + u)).
INLINE vf softplus(vf x) {
  vf u = exp(-abs(x));
  vf s = u / (2.0f + u), q = s * s;
  vf p = splat(2.0f / 13);
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  p = p * q + 2.0f;
  return (x < vf{} ? vf{} : x) + p * s;
}

struct Gate {  // silu(z) and its derivative
  vf value, slope;
};

INLINE Gate silu(vf z) {
  vf s = sigmoid(z);
  return {z * s, s * (1.0f + z * (1.0f - s))};
}

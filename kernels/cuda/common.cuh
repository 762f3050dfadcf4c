// What the scan and the convolution share: the I/O type, activations, strided rows, sums over partials.
//
// IO is set on the command line: 0 float32, 1 float16, 2 bfloat16. Arithmetic is float32.
#pragma once

#include "primitives.cuh"

#if IO == 0
typedef float io;
__device__ __forceinline__ float to_float(io v) { return v; }
__device__ __forceinline__ io from_float(float v) { return v; }
#elif IO == 1
struct io { unsigned short bits; };
__device__ __forceinline__ float to_float(io v) { return half_to_float(v.bits); }
__device__ __forceinline__ io from_float(float v) { return {float_to_half(v)}; }
#else
struct io { unsigned short bits; };
__device__ __forceinline__ float to_float(io v) { return bfloat16_to_float(v.bits); }
__device__ __forceinline__ io from_float(float v) { return {float_to_bfloat16(v)}; }
#endif

// C neighbouring values as one load brings them: whole registers until a value is taken, because a copy of part of one
// would wait for the load. Aligned to C values.
#if IO == 0
template <int C>
struct Raw {
  float value[C];
  __device__ __forceinline__ float operator[](int j) const { return value[j]; }
};
__device__ __forceinline__ void load(Raw<1>& raw, const io* p) { raw.value[0] = *p; }
__device__ __forceinline__ void load(Raw<2>& raw, const io* p) {
  float2 two = *(const float2*)p;
  raw.value[0] = two.x, raw.value[1] = two.y;
}
__device__ __forceinline__ void store(io* p, const float (&v)[1]) { *p = v[0]; }
__device__ __forceinline__ void store(io* p, const float (&v)[2]) { *(float2*)p = {v[0], v[1]}; }
#else
template <int C>
struct Raw {
  unsigned bits;
  __device__ __forceinline__ float operator[](int j) const { return to_float({(unsigned short)(bits >> 16 * j)}); }
};
__device__ __forceinline__ void load(Raw<1>& raw, const io* p) { raw.bits = *(const unsigned short*)p; }
__device__ __forceinline__ void load(Raw<2>& raw, const io* p) { raw.bits = *(const unsigned*)p; }
__device__ __forceinline__ void store(io* p, const float (&v)[1]) { *p = from_float(v[0]); }
__device__ __forceinline__ void store(io* p, const float (&v)[2]) {
  *(unsigned*)p = from_float(v[0]).bits | (unsigned)from_float(v[1]).bits << 16;
}
#endif

struct Rows {  // (batch, length, channels) whose last stride is 1; strides in bytes, that of a row below 2^31
  const char* data;
  int64 batch_stride, row_stride;
  __device__ __forceinline__ const io* at(int64 b, int t) const {
    return (const io*)(data + b * batch_stride + t * row_stride);
  }
};

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_approx(-LOG2E * x)); }

// log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|), and log1p(u) = 2 atanh(s) with s = u / (2 + u) <= 1/3.
// The polynomial in s^2 is within 4e-9 (relative), so that tiny steps keep all their digits.
__device__ __forceinline__ float softplus(float x) {
  float u = exp2_approx(-LOG2E * fabsf(x));
  float s = __fdividef(u, 2.0f + u), q = s * s;
  float p = 0.28178334f;
  p = fmaf(p, q, 0.27960603f);
  p = fmaf(p, q, 0.40024910f);
  p = fmaf(p, q, 0.66666315f);
  p = fmaf(p, q, 2.0f);
  return fmaf(p, s, fmaxf(x, 0.0f));
}

__device__ __forceinline__ float silu_slope(float z, float s) { return s * fmaf(z, 1.0f - s, 1.0f); }  // s = sigmoid(z)

// ---- sums over partial results, in a fixed order: out[i] = sum over r of partial[r * size + i] -------------

struct Plane {
  const float* partial;
  void* out;
  int64 rows, size, as_io;  // as_io: write the I/O type, else float32
};

constexpr int MAX_PLANES = 10;

struct Sums {
  Plane plane[MAX_PLANES];
};

extern "C" __global__ void sum_partials(const __grid_constant__ Sums sums) {
  const Plane& p = sums.plane[blockIdx.y];
  int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.size) return;
  float total = 0.0f;
#pragma unroll 8
  for (int64 r = 0; r < p.rows; ++r) total += p.partial[r * p.size + i];
  if (p.as_io) ((io*)p.out)[i] = from_float(total);
  else ((float*)p.out)[i] = total;
}

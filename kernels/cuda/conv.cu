// Depthwise causal convolution with optional SiLU on the GPU, one or two directions from one read of x.
//
//   pre_t = bias + sum_k weight[k] x_{t - (K-1) + k}       y_t = silu(pre_t) or pre_t
//
// A direction looks at the past, or with x_{t + (K-1) - k} at the future; a call has at most one of each. Tokens
// outside [0, L) are zero. A thread has one channel and SEGMENT tokens, and slides a window of registers over them.
// K and IO are set on the command line.
#include "common.cuh"

struct Side {
  const float *weight, *bias;  // (D, K), (D) or null; weight is null if there is no such direction
  io* y;                       // (batch, L, D)
  Rows dy;
  float *dweight, *dbias;      // (batch * segments, D, K), (batch * segments, D), partial; the last may be null
};

struct Conv {
  int64 batch, length, channels, silu;
  Side past, future;
  Rows x;
  io* dx;  // (batch, L, D)
};

constexpr int SEGMENT = 64;
constexpr int REACH = K - 1;

struct Place {  // of a thread: blockIdx.x = batch * segments + segment, blockIdx.y the channels
  int64 b;
  int c, begin, end, segment;
  __device__ __forceinline__ explicit Place(const Conv& s) {
    int segments = (s.length + SEGMENT - 1) / SEGMENT;
    b = blockIdx.x / segments, segment = blockIdx.x;
    begin = (int)(blockIdx.x % segments) * SEGMENT, end = min(begin + SEGMENT, (int)s.length);
    c = blockIdx.y * blockDim.x + threadIdx.x;
  }
};

struct Taps {
  float weight[K], bias;
  __device__ __forceinline__ Taps(const Side& side, int c) {
#pragma unroll
    for (int k = 0; k < K; ++k) weight[k] = side.weight ? side.weight[(int64)c * K + k] : 0.0f;
    bias = side.bias ? side.bias[c] : 0.0f;
  }
};

// window[i] is token t - (K-1) + i. PAST uses the first K of it, else the last K.
template <bool PAST>
__device__ __forceinline__ float convolve(const Taps& taps, const float* window) {
  float pre = taps.bias;
#pragma unroll
  for (int k = 0; k < K; ++k) pre = fmaf(taps.weight[k], window[PAST ? k : 2 * REACH - k], pre);
  return pre;
}

__device__ __forceinline__ float load(const Conv& s, const Rows& rows, const Place& at, int t) {
  return t >= 0 && t < s.length ? to_float(rows.at(at.b, t)[at.c]) : 0.0f;
}

template <int SIZE>
__device__ __forceinline__ void slide(float (&window)[SIZE], float next) {
#pragma unroll
  for (int i = 0; i + 1 < SIZE; ++i) window[i] = window[i + 1];
  window[SIZE - 1] = next;
}

extern "C" __global__ void conv_forward(const __grid_constant__ Conv s) {
  Place at(s);
  if (at.c >= s.channels) return;
  Taps past(s.past, at.c), future(s.future, at.c);
  float window[2 * REACH + 1] = {};
#pragma unroll
  for (int i = 1; i < 2 * REACH + 1; ++i) window[i] = load(s, s.x, at, at.begin - REACH - 1 + i);
#pragma unroll 8
  for (int t = at.begin; t < at.end; ++t) {
    slide(window, load(s, s.x, at, t + REACH));
    int64 out = (at.b * s.length + t) * s.channels + at.c;
    auto emit = [&](io* y, float pre) { y[out] = from_float(s.silu ? pre * sigmoid(pre) : pre); };
    if (s.past.weight) emit(s.past.y, convolve<true>(past, window));
    if (s.future.weight) emit(s.future.y, convolve<false>(future, window));
  }
}

// g_t = dy_t silu'(pre_t):   dx_t = sum_k w[k] g_{t + (K-1) - k} (past) + sum_k w[k] g_{t - (K-1) + k} (future),
// dweight[k] = sum_t g_t x_{t - (K-1) + k} (past; future alike), dbias = sum_t g_t. Where the reach of a filter leaves
// the segment, g is computed again.
template <bool PAST>
__device__ __forceinline__ float adjoint(const Conv& s, const Side& side, const Place& at, const Taps& taps,
                                         const float* window, int t, float* dweight, float& dbias) {
  if (!side.weight || t < 0 || t >= s.length) return 0.0f;
  float g = load(s, side.dy, at, t);
  if (s.silu) {
    float pre = convolve<PAST>(taps, window);
    g *= silu_slope(pre, sigmoid(pre));
  }
  if (t >= at.begin && t < at.end) {
    dbias += g;
#pragma unroll
    for (int k = 0; k < K; ++k) dweight[k] = fmaf(g, window[PAST ? k : 2 * REACH - k], dweight[k]);
  }
  return g;
}

__device__ __forceinline__ void write_sums(const Conv& s, const Side& side, const Place& at, const float* dweight,
                                           float dbias) {
  if (!side.weight) return;
  int64 row = (int64)at.segment * s.channels + at.c;
#pragma unroll
  for (int k = 0; k < K; ++k) side.dweight[row * K + k] = dweight[k];
  if (side.dbias) side.dbias[row] = dbias;
}

extern "C" __global__ void conv_backward(const __grid_constant__ Conv s) {
  Place at(s);
  if (at.c >= s.channels) return;
  Taps past(s.past, at.c), future(s.future, at.c);
  float window[2 * REACH + 1] = {}, g_past[K] = {}, g_future[2 * REACH + 1] = {};
  float dw_past[K] = {}, dw_future[K] = {}, db_past = 0.0f, db_future = 0.0f;
#pragma unroll
  for (int i = 1; i < 2 * REACH + 1; ++i) window[i] = load(s, s.x, at, at.begin - 2 * REACH - 1 + i);
#pragma unroll 8
  for (int t = at.begin - REACH; t < at.end + REACH; ++t) {
    slide(window, load(s, s.x, at, t + REACH));
    slide(g_past, adjoint<true>(s, s.past, at, past, window, t, dw_past, db_past));
    slide(g_future, adjoint<false>(s, s.future, at, future, window, t, dw_future, db_future));
    int to = t - REACH;  // g_past holds to ... t, g_future to - (K-1) ... t
    if (to < at.begin) continue;
    float dx = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      dx = fmaf(past.weight[k], g_past[REACH - k], dx);
      dx = fmaf(future.weight[k], g_future[k], dx);
    }
    s.dx[(at.b * s.length + to) * s.channels + at.c] = from_float(dx);
  }
  write_sums(s, s.past, at, dw_past, db_past);
  write_sums(s, s.future, at, dw_future, db_future);
}

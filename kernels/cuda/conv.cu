// Depthwise causal convolution with optional SiLU on the GPU, one or two directions from one read of x.
//
//   pre_t = bias + sum_k weight[k] x_{t - (K-1) + k}       y_t = silu(pre_t) or pre_t
//
// A direction looks at the past, or with x_{t + (K-1) - k} at the future; a call has at most one of each. Tokens
// outside [0, L) are zero. A thread has C neighbouring channels and a segment of tokens, and slides a window of
// registers over them; the loads of a group of tokens are under way before the first is used.
// K, EACH (C: 1 or 2), PAST, FUTURE, SILU and IO are set on the command line.
#include "common.cuh"

struct Side {
  const float *weight, *bias;  // (D, K), (D) or null
  io* y;                       // (batch, L, D)
  Rows dy;
  float *dweight, *dbias;      // (batch * segments, D, K), (batch * segments, D), partial; the last may be null
};

struct Conv {
  int64 batch, length, channels, segment;  // segment: tokens of a thread
  Side past, future;
  Rows x;
  io* dx;  // (batch, L, D)
};

constexpr int C = EACH, GROUP = 8;
constexpr int REACH = K - 1, WINDOW = 2 * REACH + 1;

struct Place {  // of a thread: blockIdx.x = batch * segments + segment, blockIdx.y the channels
  int64 b;
  int c, begin, end, segment;
  __device__ __forceinline__ explicit Place(const Conv& s) {
    int size = s.segment, segments = (s.length + size - 1) / size;
    b = blockIdx.x / segments, segment = blockIdx.x;
    begin = (int)(blockIdx.x % segments) * size, end = min(begin + size, (int)s.length);
    c = C * (blockIdx.y * blockDim.x + threadIdx.x);
  }
};

struct Taps {
  float weight[K][C], bias[C];
  __device__ __forceinline__ Taps(const Side& side, int c) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
#pragma unroll
      for (int k = 0; k < K; ++k) weight[k][j] = side.weight[(int64)(c + j) * K + k];
      bias[j] = side.bias ? side.bias[c + j] : 0.0f;
    }
  }
};

// Token t, clamped to [0, L): the value of an absent one is replaced when it is taken.
__device__ __forceinline__ void load(Raw<C>& raw, const Conv& s, const Rows& rows, const Place& at, int t) {
  load(raw, rows.at(at.b, min(max(t, 0), (int)s.length - 1)) + at.c);
}

template <int SIZE>
__device__ __forceinline__ void slide(float (&window)[SIZE][C], const float (&next)[C]) {
#pragma unroll
  for (int j = 0; j < C; ++j) {
#pragma unroll
    for (int i = 0; i + 1 < SIZE; ++i) window[i][j] = window[i + 1][j];
    window[SIZE - 1][j] = next[j];
  }
}

template <bool INNER>
__device__ __forceinline__ void slide_in(float (&window)[WINDOW][C], const Conv& s, const Raw<C>& raw, int t) {
  float x[C];
#pragma unroll
  for (int j = 0; j < C; ++j) x[j] = INNER || (t >= 0 && t < s.length) ? raw[j] : 0.0f;
  slide(window, x);
}

// window[i] is token t - (K-1) + i. The past uses the first K of it, the future the last K.
template <bool past>
__device__ __forceinline__ float convolve(const Taps& taps, const float (&window)[WINDOW][C], int j) {
  float pre = taps.bias[j];
#pragma unroll
  for (int k = 0; k < K; ++k) pre = fmaf(taps.weight[k][j], window[past ? k : 2 * REACH - k][j], pre);
  return pre;
}

template <bool past>
__device__ __forceinline__ void emit(io* y, const Taps& taps, const float (&window)[WINDOW][C]) {
  float out[C];
#pragma unroll
  for (int j = 0; j < C; ++j) {
    float pre = convolve<past>(taps, window, j);
    out[j] = SILU ? pre * sigmoid(pre) : pre;
  }
  store(y, out);
}

template <bool INNER>  // all tokens are the segment's own, and those that they reach exist
__device__ __forceinline__ void emit_group(const Conv& s, const Place& at, const Taps& past, const Taps& future,
                                           float (&window)[WINDOW][C], const Raw<C> (&raw)[GROUP], int first,
                                           io*& past_at, io*& future_at) {
#pragma unroll
  for (int k = 0; k < GROUP; ++k, past_at += s.channels, future_at += s.channels) {
    slide_in<INNER>(window, s, raw[k], first + k + REACH);
    if (PAST && (INNER || first + k < at.end)) emit<true>(past_at, past, window);
    if (FUTURE && (INNER || first + k < at.end)) emit<false>(future_at, future, window);
  }
}

extern "C" __global__ void conv_forward(const __grid_constant__ Conv s) {
  Place at(s);
  if (at.c >= s.channels) return;
  Taps past(PAST ? s.past : s.future, at.c), future(FUTURE ? s.future : s.past, at.c);
  float window[WINDOW][C] = {};
  {
    Raw<C> raw[2 * REACH + 1];
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) load(raw[i], s, s.x, at, at.begin - REACH - 1 + i);
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) slide_in<false>(window, s, raw[i], at.begin - REACH - 1 + i);
  }
  int64 out = (at.b * s.length + at.begin) * s.channels + at.c;
  io *past_at = s.past.y + out, *future_at = s.future.y + out;
  for (int first = at.begin; first < at.end; first += GROUP) {
    Raw<C> raw[GROUP];
#pragma unroll
    for (int k = 0; k < GROUP; ++k) load(raw[k], s, s.x, at, first + k + REACH);
    if (first + GROUP <= at.end && first + GROUP + REACH <= s.length)
      emit_group<true>(s, at, past, future, window, raw, first, past_at, future_at);
    else emit_group<false>(s, at, past, future, window, raw, first, past_at, future_at);
  }
}

// g_t = dy_t silu'(pre_t):   dx_t = sum_k w[k] g_{t + (K-1) - k} (past) + sum_k w[k] g_{t - (K-1) + k} (future),
// dweight[k] = sum_t g_t x_{t - (K-1) + k} (past; future alike), dbias = sum_t g_t. Where the reach of a filter leaves
// the segment, g is computed again.
template <bool past, bool INNER>
__device__ __forceinline__ void adjoint(const Conv& s, const Place& at, const Taps& taps, const Raw<C>& dy,
                                        const float (&window)[WINDOW][C], int t, float (&g)[C], float (&dweight)[K][C],
                                        float (&dbias)[C]) {
  bool there = INNER || (t >= 0 && t < s.length), own = INNER || (t >= at.begin && t < at.end);
#pragma unroll
  for (int j = 0; j < C; ++j) {
    g[j] = dy[j];
    if (SILU) {
      float pre = convolve<past>(taps, window, j);
      g[j] *= silu_slope(pre, sigmoid(pre));
    }
    g[j] = there ? g[j] : 0.0f;
    float counted = own ? g[j] : 0.0f;
    dbias[j] += counted;
#pragma unroll
    for (int k = 0; k < K; ++k) dweight[k][j] = fmaf(counted, window[past ? k : 2 * REACH - k][j], dweight[k][j]);
  }
}

__device__ __forceinline__ void write_sums(const Conv& s, const Side& side, const Place& at,
                                           const float (&dweight)[K][C], const float (&dbias)[C]) {
#pragma unroll
  for (int j = 0; j < C; ++j) {
    int64 row = (int64)at.segment * s.channels + at.c + j;
#pragma unroll
    for (int k = 0; k < K; ++k) side.dweight[row * K + k] = dweight[k][j];
    if (side.dbias) side.dbias[row] = dbias[j];
  }
}

struct Group {  // what GROUP tokens of the backward pass read: x from REACH tokens later on
  Raw<C> x[GROUP], past[GROUP], future[GROUP];
};

__device__ __forceinline__ void load(Group& raw, const Conv& s, const Place& at, int first) {
#pragma unroll
  for (int k = 0; k < GROUP; ++k) {
    load(raw.x[k], s, s.x, at, first + k + REACH);
    if (PAST) load(raw.past[k], s, s.past.dy, at, first + k);
    if (FUTURE) load(raw.future[k], s, s.future.dy, at, first + k);
  }
}

struct Adjoint {
  float window[WINDOW][C], g_past[K][C], g_future[WINDOW][C];
  float dw_past[K][C], dw_future[K][C], db_past[C], db_future[C];

  template <bool INNER>  // all tokens are the segment's own, and those that they reach exist
  __device__ __forceinline__ void advance(const Conv& s, const Place& at, const Taps& past, const Taps& future,
                                          const Group& raw, int first) {
    io* dx_at = s.dx + (at.b * s.length + first - REACH) * s.channels + at.c;
#pragma unroll
    for (int k = 0; k < GROUP; ++k, dx_at += s.channels) {
      int t = first + k;
      slide_in<INNER>(window, s, raw.x[k], t + REACH);
      float g[C] = {};
      if (PAST) adjoint<true, INNER>(s, at, past, raw.past[k], window, t, g, dw_past, db_past);
      slide(g_past, g);
      if (FUTURE) adjoint<false, INNER>(s, at, future, raw.future[k], window, t, g, dw_future, db_future);
      slide(g_future, g);
      int to = t - REACH;  // g_past holds to ... t, g_future to - (K-1) ... t
      float dx[C] = {};
#pragma unroll
      for (int j = 0; j < C; ++j)
#pragma unroll
        for (int i = 0; i < K; ++i) {
          if (PAST) dx[j] = fmaf(past.weight[i][j], g_past[REACH - i][j], dx[j]);
          if (FUTURE) dx[j] = fmaf(future.weight[i][j], g_future[i][j], dx[j]);
        }
      if (INNER || (to >= at.begin && to < at.end)) store(dx_at, dx);
    }
  }

};

extern "C" __global__ void __launch_bounds__(128) conv_backward(const __grid_constant__ Conv s) {
  Place at(s);
  if (at.c >= s.channels) return;
  Taps past(PAST ? s.past : s.future, at.c), future(FUTURE ? s.future : s.past, at.c);
  Adjoint a = {};
  {
    Raw<C> raw[WINDOW];
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) load(raw[i], s, s.x, at, at.begin - 2 * REACH - 1 + i);
#pragma unroll
    for (int i = 1; i < WINDOW; ++i) slide_in<false>(a.window, s, raw[i], at.begin - 2 * REACH - 1 + i);
  }
  int first = at.begin - REACH, end = at.end + REACH;
#pragma unroll 1
  for (; first < end; first += GROUP) {
    Group raw;
    load(raw, s, at, first);
    if (first >= at.begin + REACH && first + GROUP + REACH <= at.end) a.advance<true>(s, at, past, future, raw, first);
    else a.advance<false>(s, at, past, future, raw, first);
  }
  if (PAST) write_sums(s, s.past, at, a.dw_past, a.db_past);
  if (FUTURE) write_sums(s, s.future, at, a.dw_future, a.db_future);
}

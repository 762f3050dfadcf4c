// Depthwise causal convolution with optional SiLU on the CPU, one or two directions from one read of x.
//
//   pre_t = bias + sum_k weight[k] x_{t - (K-1) + k}       y_t = silu(pre_t) or pre_t
//
// The reverse direction looks ahead instead: x_{t + (K-1) - k}. Tokens outside [0, L) are zero.
#include <algorithm>

#include "parallel.h"
#include "vec.h"

extern "C" {

struct ConvDirection {
  const float *weight, *bias;  // (D, K), (D) or null
  float* y;                    // (batch, L, D)
  Rows dy;
  float *dweight, *dbias;
  int64_t reverse;
};

struct Conv {
  int64_t batch, length, channels, width, directions, silu;
  ConvDirection direction[2];
  Rows x;
  float* dx;  // (batch, L, D)
};

}  // extern "C"

namespace {

constexpr int TOKENS = 64;  // of one forward item

template <int K>
struct Taps {
  vf weight[K], bias;

  Taps(const ConvDirection& d, int64_t c, int lanes) {
    for (int k = 0; k < K; ++k) {
      weight[k] = vf{};
      for (int i = 0; i < lanes; ++i) weight[k][i] = d.weight[(c + i) * K + k];
    }
    bias = d.bias ? load(d.bias + c, lanes) : vf{};
  }
};

template <int K>
INLINE int64_t source(const ConvDirection& d, int64_t t, int k) {
  return d.reverse ? t + (K - 1) - k : t - (K - 1) + k;
}

template <int K>
INLINE vf preactivation(const Conv& s, const ConvDirection& d, const Taps<K>& taps, int64_t b, int64_t t, int64_t c,
                        int lanes) {
  vf pre = taps.bias;
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    int64_t from = source<K>(d, t, k);
    if (from >= 0 && from < s.length) pre += taps.weight[k] * load(s.x.at(b, from) + c, lanes);
  }
  return pre;
}

template <int K>
void forward_item(const Conv& s, int64_t b, int64_t t0, int64_t t1) {
  for (int64_t c = 0; c < s.channels; c += W) {
    int lanes = std::min<int64_t>(W, s.channels - c);
    for (int64_t e = 0; e < s.directions; ++e) {
      const ConvDirection& d = s.direction[e];
      Taps<K> taps(d, c, lanes);
      for (int64_t t = t0; t < t1; ++t) {
        vf pre = preactivation(s, d, taps, b, t, c, lanes);
        store(d.y + (b * s.length + t) * s.channels + c, s.silu ? silu(pre).value : pre, lanes);
      }
    }
  }
}

// W channels of every batch row, so that the sums over tokens need no second pass.
template <int K>
void backward_item(const Conv& s, int64_t c) {
  int lanes = std::min<int64_t>(W, s.channels - c);
  auto dx = allocate<vf>(s.length);
  vf dweight[2][K] = {}, dbias[2] = {};
  for (int64_t b = 0; b < s.batch; ++b) {
    std::fill(dx.get(), dx.get() + s.length, vf{});
    for (int64_t e = 0; e < s.directions; ++e) {
      const ConvDirection& d = s.direction[e];
      Taps<K> taps(d, c, lanes);
      for (int64_t t = 0; t < s.length; ++t) {
        vf g = load(d.dy.at(b, t) + c, lanes);
        if (s.silu) g *= silu(preactivation(s, d, taps, b, t, c, lanes)).slope;
        dbias[e] += g;
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          int64_t from = source<K>(d, t, k);
          if (from < 0 || from >= s.length) continue;
          dweight[e][k] += g * load(s.x.at(b, from) + c, lanes);
          dx[from] += g * taps.weight[k];
        }
      }
    }
    for (int64_t t = 0; t < s.length; ++t) store(s.dx + (b * s.length + t) * s.channels + c, dx[t], lanes);
  }
  for (int64_t e = 0; e < s.directions; ++e) {
    const ConvDirection& d = s.direction[e];
    for (int i = 0; i < lanes; ++i)
      for (int k = 0; k < K; ++k) d.dweight[(c + i) * K + k] = dweight[e][k][i];
    if (d.dbias) store(d.dbias + c, dbias[e], lanes);
  }
}

template <int K>
int forward(const Conv& s, int threads) {
  int64_t blocks = (s.length + TOKENS - 1) / TOKENS;
  return !parallel(s.batch * blocks, threads, [&](int64_t i) {
    int64_t t = i % blocks * TOKENS;
    forward_item<K>(s, i / blocks, t, std::min(t + TOKENS, s.length));
  });
}

template <int K>
int backward(const Conv& s, int threads) {
  return !parallel((s.channels + W - 1) / W, threads, [&](int64_t i) { backward_item<K>(s, i * W); });
}

}  // namespace

extern "C" {

// Both return 0, 1 if memory ran out, 2 if the width is not one of 1 to 4.
int dis_ssm_conv_forward(const Conv* s, int threads) {
  switch (s->width) {
    case 1: return forward<1>(*s, threads);
    case 2: return forward<2>(*s, threads);
    case 3: return forward<3>(*s, threads);
    case 4: return forward<4>(*s, threads);
  }
  return 2;
}

int dis_ssm_conv_backward(const Conv* s, int threads) {
  switch (s->width) {
    case 1: return backward<1>(*s, threads);
    case 2: return backward<2>(*s, threads);
    case 3: return backward<3>(*s, threads);
    case 4: return backward<4>(*s, threads);
  }
  return 2;
}

}  // extern "C"

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

constexpr int TOKENS = 32;          // of one item, which takes a batch row's neighbouring tokens
constexpr int ITEM_CHANNELS = 192;  // and channels
constexpr int VECTORS = ITEM_CHANNELS / W;
constexpr int AHEAD = 8;  // rows between the one in work and the one asked for

template <int K>
struct Taps {
  vf weight[K], bias;
};

// One batch row's channels [c0, c0 + ITEM_CHANNELS) and tokens [t0, t1). FULL: whole vectors only.
template <int K, bool FULL>
struct Item {
  const Conv& s;
  int64_t b, c0, t0, t1, vectors;
  Taps<K> taps[2][VECTORS];

  Item(const Conv& s, int64_t b, int64_t c0, int64_t t0)
      : s(s), b(b), c0(c0), t0(t0), t1(std::min<int64_t>(t0 + TOKENS, s.length)),
        vectors(std::min<int64_t>((s.channels - c0 + W - 1) / W, VECTORS)) {
    for (int64_t e = 0; e < s.directions; ++e)
      for (int64_t j = 0; j < vectors; ++j) {
        const ConvDirection& d = s.direction[e];
        Taps<K>& tap = taps[e][j];
        int64_t c = c0 + j * W;
        for (int k = 0; k < K; ++k) {
          tap.weight[k] = vf{};
          for (int i = 0; i < lanes(j); ++i) tap.weight[k][i] = d.weight[(c + i) * K + k];
        }
        tap.bias = d.bias ? load(d.bias + c, lanes(j)) : vf{};
      }
  }

  int lanes(int64_t j) const { return FULL ? W : (int)std::min<int64_t>(W, s.channels - c0 - j * W); }
  const float* x(int64_t t) const { return s.x.at(b, t) + c0; }

  // The rows of x under tap k = 0 ... K - 1 when direction e stands at token t; null outside.
  void window(int64_t e, int64_t t, const float* (&rows)[K]) const {
    for (int k = 0; k < K; ++k) {
      int64_t from = s.direction[e].reverse ? t + (K - 1) - k : t - (K - 1) + k;
      rows[k] = from >= 0 && from < s.length ? x(from) : nullptr;
    }
  }

  vf preactivation(int64_t e, int64_t j, const float* const (&rows)[K]) const {
    const Taps<K>& tap = taps[e][j];
    vf pre = tap.bias;
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
      if (rows[k]) pre += tap.weight[k] * load(rows[k] + j * W, lanes(j));
    return pre;
  }
};

template <int K, bool FULL>
void forward_item(const Item<K, FULL>& m) {
  const Conv& s = m.s;
  for (int64_t t = m.t0; t < m.t1; ++t) {
    prefetch_row(m.x(t + AHEAD), m.vectors);
    for (int64_t e = 0; e < s.directions; ++e) {
      const float* rows[K];
      m.window(e, t, rows);
      float* y = s.direction[e].y + (m.b * s.length + t) * s.channels + m.c0;
      for (int64_t j = 0; j < m.vectors; ++j) {
        vf pre = m.preactivation(e, j, rows);
        store(y + j * W, s.silu ? silu(pre).value : pre, m.lanes(j));
      }
      prefetch_row(y + AHEAD * s.channels, m.vectors);
    }
  }
}

// Sums of one item over its tokens, [directions][vectors].
template <int K>
struct Sums {
  vf weight[K], bias;
};

// g = dy silu'(pre) is computed for the item's tokens and for the K - 1 around them that its dx needs.
template <int K, bool FULL>
void backward_item(const Item<K, FULL>& m, Sums<K>* sums) {
  const Conv& s = m.s;
  constexpr int HALO = K - 1, SPAN = TOKENS + 2 * HALO;
  auto g = allocate<vf>(2 * SPAN * m.vectors);
  auto row = [&](int64_t e, int64_t t) { return &g[(e * SPAN + t - m.t0 + HALO) * m.vectors]; };
  for (int64_t e = 0; e < s.directions; ++e) {
    const ConvDirection& d = s.direction[e];
    for (int64_t t = m.t0 - HALO; t < m.t1 + HALO; ++t) {
      vf* g_row = row(e, t);
      std::fill(g_row, g_row + m.vectors, vf{});
      bool needed = d.reverse ? t < m.t1 : t >= m.t0;
      if (t < 0 || t >= s.length || !needed) continue;
      const float *rows[K], *dy = d.dy.at(m.b, t) + m.c0;
      m.window(e, t, rows);
      for (int64_t j = 0; j < m.vectors; ++j) {
        vf slope = s.silu ? silu(m.preactivation(e, j, rows)).slope : splat(1.0f);
        g_row[j] = load(dy + j * W, m.lanes(j)) * slope;
      }
      prefetch_row(d.dy.at(m.b, t + AHEAD) + m.c0, m.vectors);
      if (e == 0) prefetch_row(m.x(t + AHEAD), m.vectors);
    }
  }
  for (int64_t t = m.t0; t < m.t1; ++t) {
    float* dx = s.dx + (m.b * s.length + t) * s.channels + m.c0;
    for (int64_t j = 0; j < m.vectors; ++j) {
      vf total{};
      for (int64_t e = 0; e < s.directions; ++e)
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          int64_t at = s.direction[e].reverse ? t - (K - 1) + k : t + (K - 1) - k;
          total += m.taps[e][j].weight[k] * row(e, at)[j];
        }
      store(dx + j * W, total, m.lanes(j));
    }
    prefetch_row(dx + AHEAD * s.channels, m.vectors);
  }
  for (int64_t e = 0; e < s.directions; ++e)
    for (int64_t j = 0; j < m.vectors; ++j) {
      Sums<K> total{};
      for (int64_t t = m.t0; t < m.t1; ++t) {
        const float* rows[K];
        m.window(e, t, rows);
        vf v = row(e, t)[j];
        total.bias += v;
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k)
          if (rows[k]) total.weight[k] += v * load(rows[k] + j * W, m.lanes(j));
      }
      sums[e * VECTORS + j] = total;
    }
}

// Runs work(item, index) for every item; false if memory ran out.
template <int K, class F>
bool for_items(const Conv& s, int threads, const F& work) {
  int64_t groups = (s.channels + ITEM_CHANNELS - 1) / ITEM_CHANNELS, blocks = (s.length + TOKENS - 1) / TOKENS;
  return parallel(s.batch * blocks * groups, threads, [&](int64_t i) {
    int64_t b = i / groups / blocks, c = i % groups * ITEM_CHANNELS, t = i / groups % blocks * TOKENS;
    if (std::min<int64_t>(s.channels - c, ITEM_CHANNELS) % W) work(Item<K, false>(s, b, c, t), i);
    else work(Item<K, true>(s, b, c, t), i);
  });
}

template <int K>
int forward(const Conv& s, int threads) {
  return !for_items<K>(s, threads, [](const auto& item, int64_t) { forward_item(item); });
}

template <int K>
int backward(const Conv& s, int threads) try {
  int64_t groups = (s.channels + ITEM_CHANNELS - 1) / ITEM_CHANNELS;
  int64_t rows = s.batch * ((s.length + TOKENS - 1) / TOKENS);
  auto sums = allocate<Sums<K>>(rows * groups * 2 * VECTORS);
  bool ok = for_items<K>(s, threads, [&](const auto& item, int64_t i) { backward_item(item, &sums[i * 2 * VECTORS]); });
  for (int64_t e = 0; ok && e < s.directions; ++e)
    for (int64_t c = 0; c < s.channels; c += W) {
      const ConvDirection& d = s.direction[e];
      int lanes = std::min<int64_t>(W, s.channels - c);
      Sums<K> total{};
      for (int64_t r = 0; r < rows; ++r) {
        const Sums<K>& part = sums[((r * groups + c / ITEM_CHANNELS) * 2 + e) * VECTORS + c % ITEM_CHANNELS / W];
        total.bias += part.bias;
        for (int k = 0; k < K; ++k) total.weight[k] += part.weight[k];
      }
      for (int i = 0; i < lanes; ++i)
        for (int k = 0; k < K; ++k) d.dweight[(c + i) * K + k] = total.weight[k][i];
      if (d.dbias) store(d.dbias + c, total.bias, lanes);
    }
  return !ok;
} catch (const std::bad_alloc&) {
  return 1;
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

// Selective scan on the CPU, one or two directions in one call, forward and backward.
//
//   Delta_t = softplus(dt_t + bias)                       h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t
//   y_t     = C_t . h_t + D x_t                           out = (sum of y over directions) * silu(z)
//
// Work is cut into items that run in parallel and whose arithmetic does not depend on how many threads
// there are. A vector holds W neighbouring channels of one token; a block of states stays in registers
// while the tokens of a chunk go by. Letters: L tokens, D channels, N states, CHUNK tokens a chunk.
#include <algorithm>

#include "parallel.h"
#include "vec.h"

namespace {

constexpr int CHUNK = 32;           // tokens between two states kept for the backward pass
constexpr int ITEM_CHANNELS = 192;  // channels of one item, whose dB and dC it sums
constexpr float SAFE_EXPONENT = 125.0f;

}  // namespace

extern "C" {

struct Direction {
  Rows x, dt, B, C;
  const float *A, *D, *dt_bias;  // (D, N), (D), (D); the last two may be null
  float* states;                 // (batch, chunks, N, D): state at the start of each chunk, or null
  float *dx, *ddt;               // (batch, L, D)
  float *dB, *dC;                // (batch, L, N)
  float *dA, *dD, *ddt_bias;     // (D, N), (D), (D)
  int64_t reverse;
};

struct Scan {
  int64_t batch, length, channels, state, directions, softplus;
  Direction direction[2];
  Rows z, dout;    // z.data may be null
  float* out;      // (batch, L, D)
  float* pregate;  // (batch, L, D), sum over directions before the gate; null if not wanted
  float* dz;       // (batch, L, D)
};

}  // extern "C"

namespace {

// Tokens first + i * step, i = 0 .. count - 1, in the order in which a direction scans them.
struct Chunk {
  int64_t index, first, step, count;
  Chunk(int64_t length, bool reverse, int64_t index_) : index(index_) {
    int64_t begin = index * CHUNK;
    count = std::min<int64_t>(CHUNK, length - begin);
    first = reverse ? length - 1 - begin : begin;
    step = reverse ? -1 : 1;
  }
  int64_t token(int64_t i) const { return first + i * step; }
};

INLINE float* offset(float* p, int64_t n) { return p ? p + n : nullptr; }

int64_t chunk_count(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

// Two tensors' rows of the chunk to come. A vector of each is asked for at every token, while there is
// arithmetic to do.
struct Ahead {
  const float *p, *q;
  int64_t p_step, q_step;

  Ahead(const Rows& p_rows, const Rows& q_rows, int64_t b, int64_t token, int64_t channel, int64_t step)
      : p(p_rows.at(b, token) + channel), q(q_rows.at(b, token) + channel), p_step(p_rows.row_stride * step),
        q_step(q_rows.row_stride * step) {}
  void fetch(int64_t i, int64_t channel) const {
    prefetch(p + i * p_step + channel);
    prefetch(q + i * q_step + channel);
  }
};

// A log2(e) of every vector of channels, and its largest absolute value (NaN if one is not finite).
struct Rates {
  Buffer<vf> A, bound;  // [vectors][N], [vectors]

  Rates(const Scan& s, int64_t e) {
    if (e >= s.directions) return;
    const Direction& d = s.direction[e];
    int64_t N = s.state, vectors = (s.channels + W - 1) / W;
    A = allocate<vf>(vectors * N);
    bound = allocate<vf>(vectors);
    std::fill(A.get(), A.get() + vectors * N, vf{});
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t n = 0; n < N; ++n) A[c / W * N + n][c % W] = d.A[c * N + n] * LOG2E;
    for (int64_t j = 0; j < vectors; ++j) {
      vf largest{}, zero{};
      for (int64_t n = 0; n < N; ++n) {
        vf v = A[j * N + n];
        largest = abs(v) > largest ? abs(v) : largest;
        zero += v - v;
      }
      bound[j] = largest + zero;
    }
  }
};

// ---- forward ---------------------------------------------------------------------------------

struct Tile {
  vf delta[CHUNK], delta_x[CHUNK], y[CHUNK];
};

// y_i += C_i . h_i for NB states over one chunk; h is carried on.
template <int NB, bool FAST>
void forward_states(Tile& in, const vf* A, vf* h, const float* B, const float* C,
                    int64_t B_step, int64_t C_step, int64_t count, const Ahead& next, int64_t channel) {
  vf state[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) state[n] = h[n];
  for (int64_t i = 0; i < count; ++i, B += B_step, C += C_step) {
    next.fetch(i, channel);
    vf delta = in.delta[i], delta_x = in.delta_x[i], even = in.y[i], odd{};
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      vf decay = exp2_product<FAST>(delta, A[n]);
      state[n] = decay * state[n] + delta_x * B[n];
      (n % 2 ? odd : even) += state[n] * C[n];
    }
    in.y[i] = even + odd;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) h[n] = state[n];
}

template <int NB>
INLINE int64_t forward_blocks(bool fast, int64_t n, int64_t N, Tile& in, const vf* A, vf* h, const float* B,
                              const float* C, int64_t B_step, int64_t C_step, int64_t count, const Ahead (&next)[2],
                              int64_t channel) {
  auto run = fast ? forward_states<NB, true> : forward_states<NB, false>;
  for (; n + NB <= N; n += NB)
    run(in, A + n, h + n, B + n, C + n, B_step, C_step, count, next[n > 0], channel);
  return n;
}

constexpr int FORWARD_BLOCK = W == 16 ? 8 : 4;  // states in registers: 32 or 16 vector registers

// One batch row and the channels [c0, c1). A chunk is read row by row, then scanned one vector of channels
// after the other, then written row by row.
template <bool FULL>
void forward_item(const Scan& s, const Rates* rates, int64_t b, int64_t c0, int64_t c1) {
  int64_t N = s.state, vectors = (c1 - c0 + W - 1) / W;
  auto memory = allocate<vf>(vectors * (N + 2));
  vf *h = memory.get(), *skip = h + vectors * N, *bias = skip + vectors;
  auto tile = allocate<Tile>(vectors);
  auto lanes = [&](int64_t j) { return FULL ? W : (int)std::min<int64_t>(W, c1 - c0 - j * W); };
  const Rows out{s.out, s.length * s.channels, s.channels};
  for (int64_t e = 0; e < s.directions; ++e) {
    const Direction& d = s.direction[e];
    bool last = e == s.directions - 1, by_softplus = s.softplus;
    const Rows& gate = last && s.z.data ? s.z : d.x;
    const vf *A = &rates[e].A[c0 / W * N], *bound = &rates[e].bound[c0 / W];
    for (int64_t j = 0; j < vectors; ++j) {
      int64_t c = c0 + j * W;
      bias[j] = d.dt_bias ? load(d.dt_bias + c, lanes(j)) : vf{};
      skip[j] = d.D ? load(d.D + c, lanes(j)) : vf{};
    }
    std::fill(h, h + vectors * N, vf{});
    for (int64_t chunk = 0; chunk < chunk_count(s.length); ++chunk) {
      Chunk k(s.length, d.reverse, chunk);
      if (d.states)
        for (int64_t n = 0; n < N; ++n)
          for (int64_t j = 0; j < vectors; ++j)
            store(d.states + ((b * chunk_count(s.length) + chunk) * N + n) * s.channels + c0 + j * W, h[j * N + n],
                  lanes(j));
      vi small = ~vi{};
      for (int64_t i = 0; i < k.count; ++i) {
        int64_t t = k.token(i);
        const float *x_row = d.x.at(b, t) + c0, *dt_row = d.dt.at(b, t) + c0;
        for (int64_t j = 0; j < vectors; ++j) {
          vf x = load(x_row + j * W, lanes(j)), v = load(dt_row + j * W, lanes(j)) + bias[j];
          if (by_softplus) v = softplus(v);
          tile[j].delta[i] = v;
          tile[j].delta_x[i] = v * x;
          tile[j].y[i] = d.D ? skip[j] * x : vf{};
          small &= abs(v) * bound[j] < splat(SAFE_EXPONENT);  // not if NaN
        }
      }
      bool fast = all(small);
      const float *B = d.B.at(b, k.first), *C = d.C.at(b, k.first);
      int64_t Bs = d.B.row_stride * k.step, Cs = d.C.row_stride * k.step;
      int64_t ahead = k.token(chunk + 1 < chunk_count(s.length) ? CHUNK : 0);
      const Ahead next[] = {{d.x, d.dt, b, ahead, c0, k.step}, {gate, out, b, ahead, c0, k.step}};
      for (int64_t j = 0; j < vectors; ++j) {
        int64_t n = 0;
        const vf* Aj = A + j * N;
        vf* hj = h + j * N;
        n = forward_blocks<FORWARD_BLOCK>(fast, n, N, tile[j], Aj, hj, B, C, Bs, Cs, k.count, next, j * W);
        n = forward_blocks<4>(fast, n, N, tile[j], Aj, hj, B, C, Bs, Cs, k.count, next, j * W);
        forward_blocks<1>(fast, n, N, tile[j], Aj, hj, B, C, Bs, Cs, k.count, next, j * W);
      }
      for (int64_t i = 0; i < k.count; ++i) {
        int64_t t = k.token(i), at = (b * s.length + t) * s.channels + c0;
        float *row = s.out + at, *pregate = last ? offset(s.pregate, at) : nullptr;
        const float* z = last && s.z.data ? s.z.at(b, t) + c0 : nullptr;
        for (int64_t j = 0; j < vectors; ++j) {
          vf v = tile[j].y[i];
          if (e) v += load(row + j * W, lanes(j));
          if (pregate) store(pregate + j * W, v, lanes(j));
          if (z) v *= silu(load(z + j * W, lanes(j))).value;
          store(row + j * W, v, lanes(j));
        }
      }
    }
  }
}

// ---- backward --------------------------------------------------------------------------------

// One vector of channels in a chunk. `s1` is sum_n g B, `s2` is sum_n g (a h') A, summed block by block of states.
struct Adjoint {
  vf x[CHUNK], delta[CHUNK], slope[CHUNK], dy[CHUNK], s1[CHUNK], s2[CHUNK];
};

// NB states of one chunk: states again from the kept one, then the adjoint g backwards.
// With a = exp(Delta A), h' the previous state:  g_i = dy_i C_i + a_{i+1} g_{i+1},
// dC += dy h, dB += g Delta x, dA += g (a h') Delta; `carry` is a g, handed to the chunk before.
template <int NB, bool FAST>
void backward_states(Adjoint& q, const vf* A, const float* h0, int64_t h0_step, int lanes, vf* carry, vf* dA,
                     vf* dB, vf* dC, const float* B, const float* C, int64_t B_step, int64_t C_step,
                     int64_t count, bool first, const Ahead& next, int64_t channel) {
  vf decay[CHUNK][NB], decayed[CHUNK][NB], v[NB];
#pragma GCC unroll 4
  for (int n = 0; n < NB; ++n) v[n] = load(h0 + n * h0_step, lanes);
  for (int64_t i = 0; i < count; ++i, B += B_step) {
    vf delta = q.delta[i], delta_x = delta * q.x[i];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
      decay[i][n] = exp2_product<FAST>(delta, A[n]);
      decayed[i][n] = decay[i][n] * v[n];
      v[n] = decayed[i][n] + delta_x * B[n];
    }
  }
  vf sum_A[NB];
#pragma GCC unroll 4
  for (int n = 0; n < NB; ++n) v[n] = carry[n], sum_A[n] = dA[n];
  C += count * C_step;
  for (int64_t i = count - 1; i >= 0; --i) {
    B -= B_step, C -= C_step;
    next.fetch(i, channel);
    vf delta = q.delta[i], delta_x = delta * q.x[i], dy = q.dy[i], s1{}, s2{};
    if (!first) s1 = q.s1[i], s2 = q.s2[i];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
      vf h = decayed[i][n] + delta_x * B[n];
      vf g = dy * C[n] + v[n];
      vf w = g * decayed[i][n];
      dC[i * NB + n] += dy * h;
      dB[i * NB + n] += g * delta_x;
      s1 += g * B[n];
      s2 += w * A[n];
      sum_A[n] += w * delta;
      v[n] = g * decay[i][n];
    }
    q.s1[i] = s1, q.s2[i] = s2;
  }
#pragma GCC unroll 4
  for (int n = 0; n < NB; ++n) carry[n] = v[n], dA[n] = sum_A[n];
}

struct Partials {  // of one direction; summed over groups and batch afterwards, in order
  Buffer<float> dB, dC;              // (batch, groups, L, N)
  Buffer<float> dA, dD, ddt_bias;    // (batch, N, D), (batch, D), (batch, D)
};

// Sums over the channels of one item, of the states a block at a time.
struct Item {
  const Scan& s;
  const Direction& d;
  Partials& out;
  int64_t b, group, groups, c0, vectors;
  const vf* A;         // [vectors][N]
  vf *carry, *dA;      // [vectors][N]
  Adjoint* q;          // [vectors]
  vf *dB, *dC;         // [CHUNK][NB]
  int lanes(int64_t j) const { return (int)std::min<int64_t>(W, s.channels - c0 - j * W); }
};

template <int NB>
INLINE int64_t backward_blocks(const Item& m, const Chunk& k, bool fast, int64_t n, const Ahead (&next)[4]) {
  int64_t N = m.s.state, D = m.s.channels;
  auto run = fast ? backward_states<NB, true> : backward_states<NB, false>;
  for (; n + NB <= N; n += NB) {
    std::fill(m.dB, m.dB + CHUNK * NB, vf{});
    std::fill(m.dC, m.dC + CHUNK * NB, vf{});
    const float* h0 = m.d.states + ((m.b * chunk_count(m.s.length) + k.index) * N + n) * D + m.c0;
    for (int64_t j = 0; j < m.vectors; ++j)
      run(m.q[j], m.A + j * N + n, h0 + j * W, D, m.lanes(j), m.carry + j * N + n, m.dA + j * N + n, m.dB, m.dC,
          m.d.B.at(m.b, k.first) + n, m.d.C.at(m.b, k.first) + n, m.d.B.row_stride * k.step,
          m.d.C.row_stride * k.step, k.count, n == 0, next[n / NB % 4], j * W);
    for (int64_t i = 0; i < k.count; ++i) {
      int64_t at = ((m.b * m.groups + m.group) * m.s.length + k.token(i)) * N + n;
      for (int p = 0; p < NB; ++p) {
        m.out.dB[at + p] = sum<W>(m.dB[i * NB + p]);
        m.out.dC[at + p] = sum<W>(m.dC[i * NB + p]);
      }
    }
  }
  return n;
}

constexpr int BACKWARD_BLOCK = 4;

// One direction, one batch row, the channels [c0, c1): chunks backwards, inside them the channels.
template <bool FULL>
void backward_item(const Scan& s, const Direction& d, const Rates& rates, Partials& out, bool first, int64_t b,
                   int64_t group, int64_t groups, int64_t c0, int64_t c1) {
  int64_t N = s.state, vectors = (c1 - c0 + W - 1) / W, D = s.channels;
  auto lanes = [&](int64_t j) { return FULL ? W : (int)std::min<int64_t>(W, c1 - c0 - j * W); };
  auto own = [&](const float* p) { return Rows{p, s.length * D, D}; };
  bool by_softplus = s.softplus, gated = s.z.data && first;
  const vf *A = &rates.A[c0 / W * N], *bound = &rates.bound[c0 / W];
  auto memory = allocate<vf>(vectors * (2 * N + 4) + 2 * CHUNK * BACKWARD_BLOCK);
  auto tile = allocate<Adjoint>(vectors);
  vf *carry = memory.get(), *dA = carry + vectors * N, *dD = dA + vectors * N, *dbias = dD + vectors;
  vf *skip = dbias + vectors, *bias = skip + vectors, *dB = bias + vectors;
  std::fill(carry, skip, vf{});
  Item m{s, d, out, b, group, groups, c0, vectors, A, carry, dA, tile.get(), dB, dB + CHUNK * BACKWARD_BLOCK};
  for (int64_t j = 0; j < vectors; ++j) {
    int64_t c = c0 + j * W;
    bias[j] = d.dt_bias ? load(d.dt_bias + c, lanes(j)) : vf{};
    skip[j] = d.D ? load(d.D + c, lanes(j)) : vf{};
  }

  for (int64_t chunk = chunk_count(s.length) - 1; chunk >= 0; --chunk) {
    Chunk k(s.length, d.reverse, chunk);
    vi small = ~vi{};
    for (int64_t i = 0; i < k.count; ++i) {
      int64_t t = k.token(i);
      const float *x_row = d.x.at(b, t) + c0, *dt_row = d.dt.at(b, t) + c0;
      for (int64_t j = 0; j < vectors; ++j) {
        Adjoint& q = tile[j];
        vf x = load(x_row + j * W, lanes(j)), v = load(dt_row + j * W, lanes(j)) + bias[j], slope = splat(1.0f);
        if (by_softplus) {
          slope = sigmoid(v);
          v = softplus(v);
        }
        q.slope[i] = slope;
        q.x[i] = x;
        q.delta[i] = v;
        small &= abs(v) * bound[j] < splat(SAFE_EXPONENT);  // not if NaN
      }
    }
    for (int64_t i = 0; i < k.count; ++i) {
      int64_t t = k.token(i), at = (b * s.length + t) * D + c0;
      const float *dout = s.dout.at(b, t) + c0, *z = s.z.data ? s.z.at(b, t) + c0 : nullptr, *pregate = s.pregate + at;
      float* dz = gated ? s.dz + at : nullptr;
      for (int64_t j = 0; j < vectors; ++j) {
        vf dy = load(dout + j * W, lanes(j));
        if (z) {
          Gate gate = silu(load(z + j * W, lanes(j)));
          if (dz) store(dz + j * W, dy * gate.slope * load(pregate + j * W, lanes(j)), lanes(j));
          dy *= gate.value;
        }
        tile[j].dy[i] = dy;
      }
    }
    bool fast = all(small);
    int64_t ahead = k.token(chunk ? -CHUNK : 0);
    const Ahead next[] = {{d.x, d.dt, b, ahead, c0, k.step},
                          {s.dout, s.z.data ? s.z : d.x, b, ahead, c0, k.step},
                          {own(d.dx), own(d.ddt), b, ahead, c0, k.step},
                          {own(gated ? s.pregate : d.dx), own(gated ? s.dz : d.dx), b, ahead, c0, k.step}};
    int64_t n = backward_blocks<BACKWARD_BLOCK>(m, k, fast, 0, next);
    backward_blocks<1>(m, k, fast, n, next);
    for (int64_t i = 0; i < k.count; ++i) {
      int64_t at = (b * s.length + k.token(i)) * D + c0;
      float *dx_row = d.dx + at, *ddt_row = d.ddt + at;
      for (int64_t j = 0; j < vectors; ++j) {
        const Adjoint& q = tile[j];
        vf dx = q.delta[i] * q.s1[i];
        if (d.D) dx += skip[j] * q.dy[i];
        vf ddt = (q.x[i] * q.s1[i] + q.s2[i] * (1.0f / LOG2E)) * q.slope[i];
        dD[j] += q.dy[i] * q.x[i];
        dbias[j] += ddt;
        store(dx_row + j * W, dx, lanes(j));
        store(ddt_row + j * W, ddt, lanes(j));
      }
    }
  }

  for (int64_t j = 0; j < vectors; ++j) {
    int64_t c = c0 + j * W;
    for (int64_t n = 0; n < N; ++n) store(&out.dA[(b * N + n) * D + c], dA[j * N + n], lanes(j));
    store(&out.dD[b * D + c], dD[j], lanes(j));
    store(&out.ddt_bias[b * D + c], dbias[j], lanes(j));
  }
}

// dB, dC of one batch row: sum over the groups of channels.
void sum_groups(const Scan& s, const Direction& d, const Partials& p, int64_t b, int64_t groups) {
  int64_t size = s.length * s.state;
  const float* parts[] = {&p.dB[b * groups * size], &p.dC[b * groups * size]};
  float* out[] = {d.dB + b * size, d.dC + b * size};
  for (int which = 0; which < 2; ++which)
    for (int64_t i = 0; i < size; ++i) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) total += parts[which][g * size + i];
      out[which][i] = total;
    }
}

// dA, dD, d bias of the channels [c0, c1): sum over the batch.
void sum_batch(const Scan& s, const Direction& d, const Partials& p, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) {
    for (int64_t n = 0; n < s.state; ++n) {
      float total = 0;
      for (int64_t b = 0; b < s.batch; ++b) total += p.dA[(b * s.state + n) * s.channels + c];
      d.dA[c * s.state + n] = total;
    }
    float dD = 0, dbias = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      dD += p.dD[b * s.channels + c];
      dbias += p.ddt_bias[b * s.channels + c];
    }
    if (d.dD) d.dD[c] = dD;
    if (d.ddt_bias) d.ddt_bias[c] = dbias;
  }
}

}  // namespace

extern "C" {

int64_t dis_ssm_chunk() { return CHUNK; }

int dis_ssm_has_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

// out[i] = 2^(scale v[i]), `rounds` times, count a multiple of W: the decay alone, the floor that benchmarks compare with.
void dis_ssm_exp2(const float* v, float* out, int64_t count, float scale, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i < count; i += W) store(out + i, exp2_product<true>(load(v + i), splat(scale)));
}

// Both return 0, or 1 if memory ran out.
int dis_ssm_scan_forward(const Scan* s, int threads) try {
  const Rates rates[] = {{*s, 0}, {*s, 1}};
  int64_t groups = (s->channels + ITEM_CHANNELS - 1) / ITEM_CHANNELS;
  return !parallel(s->batch * groups, threads, [&](int64_t i) {
    int64_t c = i % groups * ITEM_CHANNELS, end = std::min(c + ITEM_CHANNELS, s->channels);
    ((end - c) % W ? forward_item<false> : forward_item<true>)(*s, rates, i / groups, c, end);
  });
} catch (const std::bad_alloc&) {
  return 1;
}

int dis_ssm_scan_backward(const Scan* s, int threads) try {
  const Rates rates[] = {{*s, 0}, {*s, 1}};
  int64_t groups = (s->channels + ITEM_CHANNELS - 1) / ITEM_CHANNELS;
  auto end = [&](int64_t g) { return std::min((g + 1) * ITEM_CHANNELS, s->channels); };
  Partials partials[2];
  for (int64_t e = 0; e < s->directions; ++e) {
    int64_t tokens = s->batch * groups * s->length * s->state, rows = s->batch * s->channels;
    partials[e] = {allocate<float>(tokens), allocate<float>(tokens), allocate<float>(rows * s->state),
                   allocate<float>(rows), allocate<float>(rows)};
  }
  bool ok = parallel(s->batch * groups * s->directions, threads, [&](int64_t i) {
    int64_t e = i % s->directions, g = i / s->directions % groups, b = i / s->directions / groups;
    auto run = (end(g) - g * ITEM_CHANNELS) % W ? backward_item<false> : backward_item<true>;
    run(*s, s->direction[e], rates[e], partials[e], e == 0, b, g, groups, g * ITEM_CHANNELS, end(g));
  });
  for (int64_t e = 0; ok && e < s->directions; ++e) {
    const Direction& d = s->direction[e];
    parallel(s->batch, threads, [&](int64_t b) { sum_groups(*s, d, partials[e], b, groups); });
    parallel(groups, threads, [&](int64_t g) { sum_batch(*s, d, partials[e], g * ITEM_CHANNELS, end(g)); });
  }
  return !ok;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"

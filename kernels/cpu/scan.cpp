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
constexpr int FORWARD_CHANNELS = 64;   // channels of one forward item
constexpr int BACKWARD_CHANNELS = 192;  // of one backward item, which sums their dB and dC
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

// Rows are far apart, so the hardware does not foresee the next one. Asking for the rows of the next
// chunk while this one is computed hides the memory; an address past the end does no harm.
INLINE void prefetch(const Rows& r, int64_t b, int64_t t, int64_t c) {
  __builtin_prefetch(r.data + b * r.batch_stride + t * r.row_stride + c);
}

int64_t chunk_count(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

// Column of A for W channels, times log2(e), as N vectors; returns the largest |A|, NaN if one is not finite.
vf load_A(const Scan& s, const Direction& d, int64_t c, int lanes, vf* A) {
  vf largest{}, zero{};
  for (int64_t n = 0; n < s.state; ++n) {
    vf v{};
    for (int i = 0; i < lanes; ++i) v[i] = d.A[(c + i) * s.state + n];
    A[n] = v * LOG2E;
    largest = abs(A[n]) > largest ? abs(A[n]) : largest;
    zero += A[n] - A[n];
  }
  return largest + zero;
}

// x, Delta and Delta * x of a chunk; returns whether every exponent is small enough for the fast exp2.
struct Inputs {
  vf x[CHUNK], delta[CHUNK], delta_x[CHUNK];

  bool fill(const Scan& s, const Direction& d, int64_t b, int64_t c, int lanes, const Chunk& k, vf bound) {
    vf bias = d.dt_bias ? load(d.dt_bias + c, lanes) : vf{};
    vi small = ~vi{};
    for (int64_t i = 0; i < k.count; ++i) {
      prefetch(d.x, b, k.token(i + CHUNK), c);
      prefetch(d.dt, b, k.token(i + CHUNK), c);
      x[i] = load(d.x.at(b, k.token(i)) + c, lanes);
      vf v = load(d.dt.at(b, k.token(i)) + c, lanes) + bias;
      delta[i] = s.softplus ? softplus(v) : v;
      delta_x[i] = delta[i] * x[i];
      small &= abs(delta[i]) * bound < splat(SAFE_EXPONENT);  // not if NaN
    }
    return all(small);
  }
};

// ---- forward ---------------------------------------------------------------------------------

// y_i += C_i . h_i for NB states over one chunk; h is carried on.
template <int NB, bool FAST>
void forward_states(const Inputs& in, const vf* A, vf* h, vf* y, const float* B, const float* C,
                    int64_t B_step, int64_t C_step, int64_t count) {
  vf state[NB];
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) state[n] = h[n];
  for (int64_t i = 0; i < count; ++i, B += B_step, C += C_step) {
    vf delta = in.delta[i], delta_x = in.delta_x[i], even = y[i], odd{};
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
      vf decay = exp2_product<FAST>(delta, A[n]);
      state[n] = decay * state[n] + delta_x * B[n];
      (n % 2 ? odd : even) += state[n] * C[n];
    }
    y[i] = even + odd;
  }
#pragma GCC unroll 16
  for (int n = 0; n < NB; ++n) h[n] = state[n];
}

template <int NB>
INLINE int64_t forward_blocks(bool fast, int64_t n, int64_t N, const Inputs& in, const vf* A, vf* h, vf* y,
                              const float* B, const float* C, int64_t B_step, int64_t C_step, int64_t count) {
  auto run = fast ? forward_states<NB, true> : forward_states<NB, false>;
  for (; n + NB <= N; n += NB) run(in, A + n, h + n, y, B + n, C + n, B_step, C_step, count);
  return n;
}

constexpr int FORWARD_BLOCK = W == 16 ? 16 : 4;  // states in registers: 32 or 16 vector registers

// One chunk of direction e for W channels: adds y to the output, and after the last direction gates it.
void forward_chunk(const Scan& s, int64_t e, int64_t b, int64_t c, int lanes, const Chunk& k, vf bound, const vf* A,
                   vf* h) {
  const Direction& d = s.direction[e];
  if (d.states)
    for (int64_t n = 0; n < s.state; ++n)
      store(d.states + ((b * chunk_count(s.length) + k.index) * s.state + n) * s.channels + c, h[n], lanes);
  Inputs in;
  bool fast = in.fill(s, d, b, c, lanes, k, bound);
  vf y[CHUNK], skip = d.D ? load(d.D + c, lanes) : vf{};
  for (int64_t i = 0; i < k.count; ++i) y[i] = d.D ? skip * in.x[i] : vf{};
  const float *B = d.B.at(b, k.first), *C = d.C.at(b, k.first);
  int64_t Bs = d.B.row_stride * k.step, Cs = d.C.row_stride * k.step, n = 0;
  n = forward_blocks<FORWARD_BLOCK>(fast, n, s.state, in, A, h, y, B, C, Bs, Cs, k.count);
  n = forward_blocks<4>(fast, n, s.state, in, A, h, y, B, C, Bs, Cs, k.count);
  forward_blocks<1>(fast, n, s.state, in, A, h, y, B, C, Bs, Cs, k.count);

  bool last = e == s.directions - 1;
  for (int64_t i = 0; i < k.count; ++i) {
    int64_t t = k.token(i), at = (b * s.length + t) * s.channels + c;
    vf v = e == 0 ? y[i] : y[i] + load(s.out + at, lanes);
    if (last && s.pregate) store(s.pregate + at, v, lanes);
    if (last && s.z.data) v *= silu(load(s.z.at(b, t) + c, lanes)).value;
    store(s.out + at, v, lanes);
  }
}

// One batch row and the channels [c0, c1): chunk after chunk, inside them the channels.
void forward_item(const Scan& s, int64_t b, int64_t c0, int64_t c1) {
  int64_t N = s.state, vectors = (c1 - c0 + W - 1) / W;
  auto memory = allocate<vf>(vectors * (2 * N + 1));
  vf *A = memory.get(), *h = A + vectors * N, *bound = h + vectors * N;
  auto lanes = [&](int64_t j) { return (int)std::min<int64_t>(W, c1 - c0 - j * W); };
  for (int64_t e = 0; e < s.directions; ++e) {
    for (int64_t j = 0; j < vectors; ++j) bound[j] = load_A(s, s.direction[e], c0 + j * W, lanes(j), A + j * N);
    std::fill(h, h + vectors * N, vf{});
    for (int64_t chunk = 0; chunk < chunk_count(s.length); ++chunk) {
      Chunk k(s.length, s.direction[e].reverse, chunk);
      for (int64_t j = 0; j < vectors; ++j)
        forward_chunk(s, e, b, c0 + j * W, lanes(j), k, bound[j], A + j * N, h + j * N);
    }
  }
}

// ---- backward --------------------------------------------------------------------------------

// What the passes over one chunk and W channels share. `s1` is sum_n g B, `s2` is sum_n g (a h') A.
struct Adjoint {
  Inputs in;
  vf dy[CHUNK], s1[CHUNK], s2[CHUNK];
};

// NB states of one chunk: states again from the kept one, then the adjoint g backwards.
// With a = exp(Delta A), h' the previous state:  g_i = dy_i C_i + a_{i+1} g_{i+1},
// dC += dy h, dB += g Delta x, dA += g (a h') Delta; `carry` is a g, handed to the chunk before.
template <int NB, bool FAST>
void backward_states(Adjoint& q, const vf* A, const float* h0, int64_t h0_step, int lanes, vf* carry, vf* dA,
                     vf* dB, vf* dC, int64_t N, const float* B, const float* C, int64_t B_step, int64_t C_step,
                     int64_t count) {
  vf decay[CHUNK][NB], decayed[CHUNK][NB], v[NB];
#pragma GCC unroll 4
  for (int n = 0; n < NB; ++n) v[n] = load(h0 + n * h0_step, lanes);
  for (int64_t i = 0; i < count; ++i, B += B_step) {
    vf delta = q.in.delta[i], delta_x = q.in.delta_x[i];
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
    vf delta = q.in.delta[i], delta_x = q.in.delta_x[i], dy = q.dy[i], s1 = q.s1[i], s2 = q.s2[i];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
      vf h = decayed[i][n] + delta_x * B[n];
      vf g = dy * C[n] + v[n];
      vf w = g * decayed[i][n];
      dC[i * N + n] += dy * h;
      dB[i * N + n] += g * delta_x;
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

template <int NB>
INLINE int64_t backward_blocks(bool fast, int64_t n, int64_t N, Adjoint& q, const vf* A, const float* h0,
                               int64_t h0_step, int lanes, vf* carry, vf* dA, vf* dB, vf* dC, const float* B,
                               const float* C, int64_t B_step, int64_t C_step, int64_t count) {
  auto run = fast ? backward_states<NB, true> : backward_states<NB, false>;
  for (; n + NB <= N; n += NB)
    run(q, A + n, h0 + n * h0_step, h0_step, lanes, carry + n, dA + n, dB + n, dC + n, N, B + n, C + n, B_step,
        C_step, count);
  return n;
}

struct Partials {     // of one direction; summed over groups and batch afterwards, in order
  Buffer<float> dB, dC;              // (batch, groups, L, N)
  Buffer<float> dA, dD, ddt_bias;    // (batch, N, D), (batch, D), (batch, D)
};

// One direction, one batch row, the channels [c0, c1): chunks backwards, inside them the channels.
void backward_item(const Scan& s, const Direction& d, Partials& out, bool first, int64_t b, int64_t group,
                   int64_t groups, int64_t c0, int64_t c1) {
  int64_t N = s.state, vectors = (c1 - c0 + W - 1) / W, chunks = chunk_count(s.length);
  // per vector of channels: A, carry and dA (N each), bound on |A|, dD, d bias
  auto memory = allocate<vf>(vectors * (3 * N + 3) + 2 * CHUNK * N);
  vf *A = memory.get(), *carry = A + vectors * N, *dA = carry + vectors * N, *bound = dA + vectors * N;
  vf *dD = bound + vectors, *dbias = dD + vectors, *dB = dbias + vectors, *dC = dB + CHUNK * N;
  std::fill(carry, dB, vf{});
  for (int64_t j = 0; j < vectors; ++j)
    bound[j] = load_A(s, d, c0 + j * W, std::min<int64_t>(W, c1 - c0 - j * W), A + j * N);
  Adjoint q;

  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    Chunk k(s.length, d.reverse, chunk);
    std::fill(dB, dC + CHUNK * N, vf{});
    for (int64_t j = 0; j < vectors; ++j) {
      int64_t c = c0 + j * W;
      int lanes = std::min<int64_t>(W, c1 - c);
      bool fast = q.in.fill(s, d, b, c, lanes, k, bound[j]);
      for (int64_t i = 0; i < k.count; ++i) {
        int64_t t = k.token(i), at = (b * s.length + t) * s.channels + c;
        vf dout = load(s.dout.at(b, t) + c, lanes);
        q.dy[i] = dout;
        q.s1[i] = q.s2[i] = vf{};
        if (!s.z.data) continue;
        Gate gate = silu(load(s.z.at(b, t) + c, lanes));
        q.dy[i] = dout * gate.value;
        if (first) store(s.dz + at, dout * gate.slope * load(s.pregate + at, lanes), lanes);
      }
      const float *B = d.B.at(b, k.first), *C = d.C.at(b, k.first);
      const float* h0 = d.states + (b * chunks + chunk) * N * s.channels + c;
      int64_t Bs = d.B.row_stride * k.step, Cs = d.C.row_stride * k.step, n = 0;
      n = backward_blocks<4>(fast, n, N, q, A + j * N, h0, s.channels, lanes, carry + j * N, dA + j * N, dB, dC,
                             B, C, Bs, Cs, k.count);
      backward_blocks<1>(fast, n, N, q, A + j * N, h0, s.channels, lanes, carry + j * N, dA + j * N, dB, dC, B, C,
                         Bs, Cs, k.count);

      vf skip = d.D ? load(d.D + c, lanes) : vf{}, bias = d.dt_bias ? load(d.dt_bias + c, lanes) : vf{};
      for (int64_t i = 0; i < k.count; ++i) {
        int64_t t = k.token(i), at = (b * s.length + t) * s.channels + c;
        vf dx = q.in.delta[i] * q.s1[i];
        if (d.D) dx += skip * q.dy[i];
        vf ddt = q.in.x[i] * q.s1[i] + q.s2[i] * (1.0f / LOG2E);
        if (s.softplus) ddt *= sigmoid(load(d.dt.at(b, t) + c, lanes) + bias);
        dD[j] += q.dy[i] * q.in.x[i];
        dbias[j] += ddt;
        store(d.dx + at, dx, lanes);
        store(d.ddt + at, ddt, lanes);
      }
    }
    for (int64_t i = 0; i < k.count; ++i) {
      int64_t at = ((b * groups + group) * s.length + k.token(i)) * N;
      for (int64_t n = 0; n < N; ++n) {
        out.dB[at + n] = sum(dB[i * N + n]);
        out.dC[at + n] = sum(dC[i * N + n]);
      }
    }
  }

  for (int64_t j = 0; j < vectors; ++j) {
    int64_t c = c0 + j * W;
    int lanes = std::min<int64_t>(W, c1 - c);
    for (int64_t n = 0; n < N; ++n) store(&out.dA[(b * N + n) * s.channels + c], dA[j * N + n], lanes);
    store(&out.dD[b * s.channels + c], dD[j], lanes);
    store(&out.ddt_bias[b * s.channels + c], dbias[j], lanes);
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

// Both return 0, or 1 if memory ran out.
int dis_ssm_scan_forward(const Scan* s, int threads) {
  int64_t tiles = (s->channels + FORWARD_CHANNELS - 1) / FORWARD_CHANNELS;
  return !parallel(s->batch * tiles, threads, [&](int64_t i) {
    int64_t c = i % tiles * FORWARD_CHANNELS;
    forward_item(*s, i / tiles, c, std::min(c + FORWARD_CHANNELS, s->channels));
  });
}

int dis_ssm_scan_backward(const Scan* s, int threads) try {
  int64_t groups = (s->channels + BACKWARD_CHANNELS - 1) / BACKWARD_CHANNELS;
  auto end = [&](int64_t g) { return std::min((g + 1) * BACKWARD_CHANNELS, s->channels); };
  Partials partials[2];
  for (int64_t e = 0; e < s->directions; ++e) {
    int64_t tokens = s->batch * groups * s->length * s->state, rows = s->batch * s->channels;
    partials[e] = {allocate<float>(tokens), allocate<float>(tokens), allocate<float>(rows * s->state),
                   allocate<float>(rows), allocate<float>(rows)};
  }
  bool ok = parallel(s->batch * groups * s->directions, threads, [&](int64_t i) {
    int64_t e = i % s->directions, g = i / s->directions % groups, b = i / s->directions / groups;
    backward_item(*s, s->direction[e], partials[e], e == 0, b, g, groups, g * BACKWARD_CHANNELS, end(g));
  });
  for (int64_t e = 0; ok && e < s->directions; ++e) {
    const Direction& d = s->direction[e];
    parallel(s->batch, threads, [&](int64_t b) { sum_groups(*s, d, partials[e], b, groups); });
    parallel(groups, threads, [&](int64_t g) { sum_batch(*s, d, partials[e], g * BACKWARD_CHANNELS, end(g)); });
  }
  return !ok;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"

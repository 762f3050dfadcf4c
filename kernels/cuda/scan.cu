// Selective scan on the GPU, one or two directions, forward and backward.
//
//   Delta_t = softplus(dt_t + bias)       a_t = exp(Delta_t A)      h_t = a_t h_{t-1} + Delta_t B_t x_t
//   y_t     = C_t . h_t + D x_t           out = (sum of y over directions) * silu(z)
//
// Everything is channels-last. A thread keeps the states of its channels in registers and walks the tokens;
// B and C of a tile of tokens lie in shared memory and are read by broadcast. The reverse direction is index
// arithmetic. Nothing is atomic: every sum has a fixed order. STATES (16, 32 or 64; N is padded with zeros), WARPS
// (of a backward block), SOFTPLUS, GATED (there is a z), SKIPS (a D), KEEPS (states are kept), FULL (every block has
// all its channels), ALIGNED (see copy_chunk) and IO are set on the command line.
// Letters: b batch, t token in memory, i token in scan order, c channel, n state.
#include "common.cuh"

constexpr int CHUNK = 16;  // tokens between two states kept for the backward pass
constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

struct Direction {
  Rows x, dt, B, C;
  const float *A, *D, *dt_bias;  // (D, N), (D), (D); the last two may be null
  float* states;                 // (batch, chunks, N, D): state at the start of each chunk, or null
  io *dx, *ddt;                  // (batch, L, D)
  float *dB, *dC;                // (groups, batch, L, N), partial
  float *dA, *dD, *ddt_bias;     // (batch, D, N), (batch, D), (batch, D), partial; the last two may be null
  int64 reverse;
};

struct Scan {
  int64 batch, length, channels, state, directions;
  Direction direction[2];
  Rows z, dout;    // z.data may be null
  io* out;         // (batch, L, D)
  float* pregate;  // (batch, L, D) sum over directions before the gate; scratch of the forward pass, or null
  float* y;        // (2, batch, L, D) scratch when the directions have their own blocks
  io* dz;          // (batch, L, D)
};

// ---- pieces ------------------------------------------------------------------------------------------------

// The tokens of batch row b in scan order, from channel c on. It is moved along: an addition costs less than a product.
template <class T>
struct Walk {
  char* at;
  int step;  // in bytes
  __device__ __forceinline__ Walk(const Scan& s, const Direction& d, const void* data, int64 row_stride, int c)
      : at((char*)data + (d.reverse ? (s.length - 1) * row_stride : 0) + c * (int64)sizeof(T)),
        step(d.reverse ? -(int)row_stride : (int)row_stride) {}
  __device__ __forceinline__ T& operator[](int c) const { return ((T*)at)[c]; }
  __device__ __forceinline__ void move(int tokens) { at += (int64)tokens * step; }
  __device__ __forceinline__ Walk moved(int tokens) const {
    Walk w = *this;
    w.move(tokens);
    return w;
  }
};

__device__ __forceinline__ Walk<const io> walk(const Scan& s, const Direction& d, const Rows& rows, int64 b, int c) {
  return {s, d, rows.data + b * rows.batch_stride, rows.row_stride, c};
}

template <class T>  // of a contiguous (batch, L, D)
__device__ __forceinline__ Walk<T> walk(const Scan& s, const Direction& d, T* data, int64 b, int c) {
  return {s, d, data + b * s.length * s.channels, s.channels * (int64)sizeof(T), c};
}

__device__ __forceinline__ float time_step(float v) { return SOFTPLUS ? softplus(v) : v; }

__device__ __forceinline__ float optional(const float* p, int c) { return p ? p[c] : 0.0f; }

__device__ __forceinline__ float scaled_A(const Scan& s, const Direction& d, int c, int n) {
  float A = (FULL || c < s.channels) && n < s.state ? d.A[(int64)c * s.state + n] * LOG2E : 0.0f;
  return A < -3e38f ? -3e38f : A;  // finite, so that an absent token, whose Delta is 0, has decay 1
}

__device__ __forceinline__ float4 quad(const float* p) { return *(const float4*)p; }

// Sums COUNT values over the lanes that differ in the bits from MASK down to LAST. Where there are several
// values a lane keeps half of them a step: the values are scattered over the lanes, highest bit first.
template <int COUNT, int MASK, int LAST>
__device__ __forceinline__ void scatter_sum(float* v, int lane) {
  if constexpr (COUNT > 1) {
    bool upper = lane & MASK;
#pragma unroll
    for (int j = 0; j < COUNT / 2; ++j) {
      float keep = upper ? v[j + COUNT / 2] : v[j], give = upper ? v[j] : v[j + COUNT / 2];
      v[j] = keep + __shfl_xor_sync(ALL, give, MASK);
    }
  } else {
    v[0] += __shfl_xor_sync(ALL, v[0], MASK);
  }
  if constexpr (MASK > LAST) scatter_sum<(COUNT > 1 ? COUNT / 2 : 1), MASK / 2, LAST>(v, lane);
}

// ---- forward -----------------------------------------------------------------------------------------------

constexpr int TILE = 8;      // tokens of B and C in shared memory, twice
constexpr int THREADS = 64;  // of a forward block
static_assert(CHUNK % TILE == 0 && THREADS % STATES == 0);

// S states of V channels a thread; STATES / S neighbouring lanes share their channels. AHEAD tokens of x and dt are
// fetched in advance. The block covers V * THREADS * S / STATES channels. It adds y to the sum that it finds (ADD), and
// finishes the sum with the gate or leaves it to another (FINISH). Absent channels compute on zeros. C . h is summed in
// fours of states and then as the butterfly does, so that y does not depend on S.
template <int S, int V, int AHEAD, bool ADD, bool FINISH>
__device__ __forceinline__ void forward(const Scan& s, const Direction& d, float* sum_data) {
  constexpr int LANES = STATES / S, CHANNELS = THREADS / LANES, ROW = 2 * STATES;
  constexpr int PASS = THREADS / STATES, PASSES = TILE / PASS;  // tokens of B and of C that the block fetches at once
  float* tiles = (float*)dynamic_shared;  // [2][TILE][B 0 .. STATES-1, C 0 .. STATES-1]
  int64 b = blockIdx.x;
  int q = threadIdx.x % LANES, c0 = blockIdx.y * (V * CHANNELS) + threadIdx.x / LANES;
  int own_n = threadIdx.x % STATES, own_i = threadIdx.x / STATES;
  int length = s.length;
  constexpr bool gated = FINISH && GATED, store_sum = !FINISH || (gated && KEEPS);
  float A[V][S], h[V][S], skip[V], bias[V];
  bool live[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    int c = c0 + v * CHANNELS;
    live[v] = FULL || c < s.channels;
    skip[v] = live[v] ? optional(d.D, c) : 0.0f;
    bias[v] = live[v] ? optional(d.dt_bias, c) : 0.0f;
#pragma unroll
    for (int n = 0; n < S; ++n) A[v][n] = scaled_A(s, d, c, q * S + n), h[v][n] = 0.0f;
  }

  auto x_at = walk(s, d, d.x, b, c0), dt_at = walk(s, d, d.dt, b, c0), z_at = walk(s, d, s.z, b, c0);
  auto sum_at = walk(s, d, sum_data, b, c0), sum_out = sum_at;
  auto out_at = walk(s, d, s.out, b, c0);
  Raw<1> next_x[AHEAD][V] = {}, next_dt[AHEAD][V] = {}, next_z[AHEAD][V] = {};
  float next_sum[AHEAD][V] = {};
  auto fetch = [&](int k, int i) {  // behind the end the last token again: what nobody needs costs less than a branch
    int t = min(i, length - 1);
    auto x = x_at.moved(t), dt = dt_at.moved(t), z = z_at.moved(t);
    auto sum = sum_at.moved(t);
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (live[v]) {
        load(next_x[k][v], &x[v * CHANNELS]), load(next_dt[k][v], &dt[v * CHANNELS]);
        if (gated) load(next_z[k][v], &z[v * CHANNELS]);
        if (ADD) next_sum[k][v] = sum[v * CHANNELS];
      }
  };
  auto B_at = walk(s, d, d.B, b, own_n).moved(own_i), C_at = walk(s, d, d.C, b, own_n).moved(own_i);
  float incoming[2 * PASSES];
  auto fetch_tile = [&](int i0) {
#pragma unroll
    for (int j = 0; j < PASSES; ++j) {
      bool there = i0 + j * PASS + own_i < length && own_n < s.state;
      incoming[2 * j] = there ? to_float(B_at[0]) : 0.0f;
      incoming[2 * j + 1] = there ? to_float(C_at[0]) : 0.0f;
      B_at.move(PASS), C_at.move(PASS);
    }
  };
  auto store_tile = [&](int tile) {
    float* to = tiles + tile % 2 * (TILE * ROW) + own_i * ROW + own_n;
#pragma unroll
    for (int j = 0; j < PASSES; ++j) {
      to[j * PASS * ROW] = incoming[2 * j];
      to[j * PASS * ROW + STATES] = incoming[2 * j + 1];
    }
  };
  float* kept = d.states + (b * ((length + CHUNK - 1) / CHUNK) * s.state + q * S) * s.channels + c0;

#pragma unroll
  for (int k = 0; k < AHEAD; ++k) fetch(k, k);
  fetch_tile(0);
  __syncthreads();  // the last tile of the direction before is read
  store_tile(0);
  for (int tile = 0; tile * TILE < length; ++tile) {
    __syncthreads();
    fetch_tile((tile + 1) * TILE);
    const float* row = tiles + tile % 2 * (TILE * ROW) + q * S;
    int i0 = tile * TILE, end = min(i0 + TILE, length);
    if (KEEPS && i0 % CHUNK == 0) {
      float* to = kept;
#pragma unroll
      for (int n = 0; n < S; ++n, to += s.channels)
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (live[v] && q * S + n < s.state) to[v * CHANNELS] = h[v][n];
      kept += s.state * s.channels;
    }

    for (int i = i0; i < end; i += AHEAD) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k, row += ROW) {
        bool there = i + k < end;
        float delta[V], delta_x[V], parts[V][S / 4], y[V], z[V], sum[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float x = next_x[k][v][0];
          z[v] = next_z[k][v][0], sum[v] = next_sum[k][v];
          delta[v] = time_step(next_dt[k][v][0] + bias[v]);
          delta_x[v] = delta[v] * x;
          parts[v][0] = SKIPS && q == 0 ? skip[v] * x : 0.0f;
#pragma unroll
          for (int p = 1; p < S / 4; ++p) parts[v][p] = 0.0f;
        }
        fetch(k, i + k + AHEAD);
#pragma unroll
        for (int n = 0; n < S; n += 4) {
          float4 B4 = quad(row + n), C4 = quad(row + STATES + n);
          float B[4] = {B4.x, B4.y, B4.z, B4.w}, C[4] = {C4.x, C4.y, C4.z, C4.w};
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int v = 0; v < V; ++v) {
              float decay = exp2_approx(delta[v] * A[v][n + m]);
              h[v][n + m] = fmaf(decay, h[v][n + m], delta_x[v] * B[m]);
              parts[v][n / 4] = fmaf(C[m], h[v][n + m], parts[v][n / 4]);
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if constexpr (LANES > 1)
#pragma unroll
            for (int p = 0; p < S / 4; ++p) scatter_sum<1, LANES / 2, 1>(&parts[v][p], q);
          if constexpr (S == 4) y[v] = parts[v][0];
          else y[v] = (parts[v][0] + parts[v][2]) + (parts[v][1] + parts[v][3]);
          if (ADD) y[v] += sum[v];
        }
        if (store_sum)
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (live[v] && q == 0 && there) sum_out[v * CHANNELS] = y[v];
        if (FINISH) {
          if (gated)
#pragma unroll
            for (int v = 0; v < V; ++v) y[v] *= z[v] * sigmoid(z[v]);
#pragma unroll
          for (int v = 0; v < V; ++v)
            if (live[v] && q == 0 && there) out_at[v * CHANNELS] = from_float(y[v]);
        }
        sum_out.move(1), out_at.move(1);
      }
    }
    store_tile(tile + 1);
  }
}

constexpr int BLOCKS = STATES == 16 ? 6 : 4;  // on a multiprocessor

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(const __grid_constant__ Scan s) {
  forward<16, 2, 2, false, true>(s, s.direction[0], s.pregate);
}

// One direction after the other; a thread picks up its own sum.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward_both(const __grid_constant__ Scan s) {
  forward<16, 2, 2, false, false>(s, s.direction[0], s.pregate);
  forward<16, 2, 2, true, true>(s, s.direction[1], s.pregate);
}

// For few channels and batch rows: a channel over STATES / 4 lanes. Two directions have their own blocks, and leave
// y to scan_combine.
extern "C" __global__ void __launch_bounds__(THREADS) scan_forward_apart(const __grid_constant__ Scan s) {
  if (s.directions == 1) forward<4, 1, 4, false, true>(s, s.direction[0], s.pregate);
  else forward<4, 1, 4, false, false>(s, s.direction[blockIdx.z], s.y + blockIdx.z * s.batch * s.length * s.channels);
}

extern "C" __global__ void scan_combine(const __grid_constant__ Scan s) {
  int64 rows = s.batch * s.length, size = rows * s.channels;
  int64 at = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= size) return;
  float y = s.y[at] + s.y[size + at];
  if (s.pregate) s.pregate[at] = y;
  if (s.z.data) {
    int64 row = at / s.channels;
    float z = to_float(s.z.at(row / s.length, row % s.length)[at % s.channels]);
    y *= z * sigmoid(z);
  }
  s.out[at] = from_float(y);
}

// ---- backward ----------------------------------------------------------------------------------------------
//
//   g_t  = dy_t C_t + a_{t+1} g_{t+1}     w_t = g_t (a_t h_{t-1})     dB_t = sum_c g_t Delta_t x_t
//   s1_t = sum_n g_t B_t                  s2_t = sum_n w_t A          dC_t = sum_c dy_t h_t
//   dx_t = Delta_t s1_t + D dy_t          dA = sum_t w_t Delta_t      ddt_t = (x_t s1_t + s2_t) sigmoid(dt_t + bias)
//
// Chunks run backwards from the kept states. A first sweep over the chunk leaves the state before every step of
// STEP tokens in shared memory; the steps then run backwards, and in each the states one after the other: decays
// and a h_{t-1} of one state of four channels and STEP tokens are all that has to be in registers.
//
// A warp has 32 channels and all states: lane 4 j + q holds the states n = 4 m + q of channels 4 j ... 4 j + 3.
// Work outside the recurrence is done with lane = channel. What a chunk reads is copied to shared memory while the
// chunk behind it is worked on.
constexpr int V = 4, S = STATES / 4, STEP = 4, STEPS = CHUNK / STEP;

// Shared memory. Of the block: B and C of the chunk as floats, [2 STATES][COLUMN], token innermost; and as they come,
// [2][B, C][CHUNK][STATES]. Of a warp: Delta [32] and Delta x [32] of every token, the latter making room for dB and dC
// [2 STATES] when it is spent; dy and d Delta / d dt of a step, [STEP][2][32]; a ring of states [STATES][STATE_ROW],
// before each step of the chunk and before the next chunk; x, dt, dout and z, [2][4][CHUNK][32], as they come.
constexpr int COLUMN = CHUNK + 4, ROW = WARP + (2 * STATES > WARP ? 2 * STATES : WARP) + 4, EDGE = 2 * WARP;
constexpr int STATE_ROW = WARP + 8, STATE_FLOATS = STATES * STATE_ROW, RING = STEPS + 1;
constexpr int STREAM = CHUNK * WARP, BC_STREAM = CHUNK * STATES;  // of one tensor, in io
constexpr int TILE_FLOATS = 2 * STATES * COLUMN;
constexpr int BLOCK_FLOATS = TILE_FLOATS + 4 * BC_STREAM * (int)sizeof(io) / 4;
constexpr int WARP_FLOATS = CHUNK * ROW + STEP * EDGE + RING * STATE_FLOATS + 8 * STREAM * (int)sizeof(io) / 4;

__device__ __forceinline__ void load_quad(const float* p, float (&v)[4]) {
  float4 f = *(const float4*)p;
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

__device__ __forceinline__ void store_quad(float* p, const float (&v)[4]) { *(float4*)p = {v[0], v[1], v[2], v[3]}; }

constexpr int AT_ONCE = ALIGNED ? 32 : 4;  // copies; loads need registers

// Copies CHUNK tokens of COLUMNS channels from channel c0 on; absent tokens and channels read others of the same rows.
// Part `part` of `parts` threads takes its share. ALIGNED: rows begin and end on borders of 16 bytes.
template <int COLUMNS>
__device__ __forceinline__ void copy_chunk(io* to, const Scan& s, const Direction& d, const Rows& rows, int64 b, int c0,
                                           int channels, int i0, int part, int parts) {
  int last = min(i0 + CHUNK, (int)s.length) - 1;
  constexpr int EACH = ALIGNED ? 16 / sizeof(io) : 1, PIECES = COLUMNS / EACH;
  auto at = walk(s, d, rows, b, 0);
#pragma unroll AT_ONCE
  for (int e = 0; e < CHUNK * PIECES; e += parts) {
    int i = (e + part) / PIECES, piece = (e + part) % PIECES * EACH;
    if (CHUNK * PIECES % parts && e + part >= CHUNK * PIECES) break;
    const io* from = &at.moved(min(i0 + i, last))[min(c0 + piece, channels - EACH)];
    if (ALIGNED) copy_async(to + i * COLUMNS + piece, from);
    else to[i * COLUMNS + piece] = *from;
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_backward(const __grid_constant__ Scan s) {
  float* tile = (float*)dynamic_shared;
  io* BC_stream = (io*)(tile + TILE_FLOATS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, q = lane % 4;
  float* rows = tile + BLOCK_FLOATS + warp * WARP_FLOATS;
  float* edge = rows + CHUNK * ROW + lane;
  float* ring = rows + CHUNK * ROW + STEP * EDGE;
  io* stream = (io*)(ring + RING * STATE_FLOATS);

  const Direction& d = s.direction[blockIdx.z];
  int64 b = blockIdx.x;
  int c = blockIdx.y * (WARPS * WARP) + threadIdx.x, c4 = c - q;  // lane = channel; first of the quad
  int length = s.length, channels = s.channels, state = s.state, chunks = (length + CHUNK - 1) / CHUNK;
  bool live = FULL || c < channels;
  int near = live ? c : channels - 1;
  auto dx_walk = walk(s, d, d.dx, b, near), ddt_walk = walk(s, d, d.ddt, b, near), dz_walk = walk(s, d, s.dz, b, near);
  auto sum_walk = walk(s, d, s.pregate, b, near);
  bool writes_dz = GATED && blockIdx.z == 0;
  float bias = optional(d.dt_bias, near), skip = optional(d.D, near);
  float dD = 0.0f, dbias = 0.0f;
  float A[V][S], carry[V][S], dA[V][S];
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int m = 0; m < S; ++m) A[v][m] = scaled_A(s, d, c4 + v, 4 * m + q), carry[v][m] = dA[v][m] = 0.0f;

  auto prepare = [&](int chunk, float* kept) {  // copies the chunk's inputs and the state that it starts from
    int i0 = chunk * CHUNK, c0 = c - lane;
    io *to = stream + chunk % 2 * 4 * STREAM, *BC = BC_stream + chunk % 2 * 2 * BC_STREAM;
    copy_chunk<WARP>(to, s, d, d.x, b, c0, channels, i0, lane, WARP);
    copy_chunk<WARP>(to + STREAM, s, d, d.dt, b, c0, channels, i0, lane, WARP);
    copy_chunk<WARP>(to + 2 * STREAM, s, d, s.dout, b, c0, channels, i0, lane, WARP);
    if (GATED) copy_chunk<WARP>(to + 3 * STREAM, s, d, s.z, b, c0, channels, i0, lane, WARP);
    copy_chunk<STATES>(BC, s, d, d.B, b, 0, state, i0, threadIdx.x, WARPS * WARP);
    copy_chunk<STATES>(BC + BC_STREAM, s, d, d.C, b, 0, state, i0, threadIdx.x, WARPS * WARP);
    const float* from = d.states + (b * chunks + chunk) * state * s.channels;
    constexpr int EACH = ALIGNED ? 4 : 1, PIECES = WARP / EACH;
#pragma unroll AT_ONCE
    for (int e = 0; e < STATES * PIECES; e += WARP) {
      int n = (e + lane) / PIECES, piece = (e + lane) % PIECES * EACH, column = min(c0 + piece, channels - EACH);
      if (ALIGNED) copy_async(kept + n * STATE_ROW + piece, from + n * s.channels + column);
      else kept[n * STATE_ROW + piece] = n < state ? from[n * s.channels + column] : 0.0f;
    }
  };
  int base = 0;  // of the ring: the state before the chunk
  prepare(chunks - 1, ring);

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    int i0 = chunk * CHUNK, count = min(CHUNK, length - i0), last = (count - 1) / STEP;
    copies_done();
    __syncthreads();
    int next = base ? base - 1 : RING - 1;
    if (chunk > 0) prepare(chunk - 1, ring + next * STATE_FLOATS);

    const io *x_at = stream + chunk % 2 * 4 * STREAM + lane, *BC = BC_stream + chunk % 2 * 2 * BC_STREAM;
    const io *dt_at = x_at + STREAM, *dout_at = x_at + 2 * STREAM, *z_at = x_at + 3 * STREAM;
#pragma unroll 4
    for (int e = threadIdx.x; e < 2 * BC_STREAM; e += WARPS * WARP) {
      int n = e % STATES, i = e / STATES % CHUNK;
      tile[(n + e / BC_STREAM * STATES) * COLUMN + i] = i < count && n < state ? to_float(BC[e]) : 0.0f;
    }
    // Loads, sums and stores apart: the compiler moves no load across a store to shared memory.
#pragma unroll 1
    for (int i1 = 0; i1 < CHUNK; i1 += CHUNK / 2) {
      Raw<1> x[CHUNK / 2], dt[CHUNK / 2];
      float step_of[CHUNK / 2];
#pragma unroll
      for (int k = 0; k < CHUNK / 2; ++k) load(x[k], x_at + (i1 + k) * WARP), load(dt[k], dt_at + (i1 + k) * WARP);
#pragma unroll
      for (int k = 0; k < CHUNK / 2; ++k) step_of[k] = time_step(dt[k][0] + bias);
#pragma unroll
      for (int k = 0; k < CHUNK / 2; ++k) {
        bool there = live && i1 + k < count;
        rows[(i1 + k) * ROW + lane] = there ? step_of[k] : 0.0f;
        rows[(i1 + k) * ROW + WARP + lane] = there ? step_of[k] * x[k][0] : 0.0f;
      }
    }
    float sum[STEP] = {};  // of the step to come
    auto fetch_sum = [&](int step) {
      if (!writes_dz) return;
#pragma unroll
      for (int k = 0; k < STEP; ++k) sum[k] = sum_walk.moved(i0 + min(step * STEP + k, count - 1))[0];
    };
    fetch_sum(last);
    __syncthreads();

    float delta[STEP][V], delta_x[STEP][V];
    auto load_step = [&](int step) {
#pragma unroll
      for (int k = 0; k < STEP; ++k) {
        load_quad(rows + (step * STEP + k) * ROW + lane - q, delta[k]);
        load_quad(rows + (step * STEP + k) * ROW + WARP + lane - q, delta_x[k]);
      }
    };
    // The state before a step: row 4 m + q, this lane's quad of channels.
    auto state_at = [&](int step) {
      int slot = base + step;
      return ring + (slot < RING ? slot : slot - RING) * STATE_FLOATS + q * STATE_ROW + lane - q;
    };

    float h[S][V];
#pragma unroll
    for (int m = 0; m < S; ++m) load_quad(state_at(0) + 4 * m * STATE_ROW, h[m]);
#pragma unroll 1
    for (int step = 0; step < last; ++step) {
      load_step(step);
      float* after = state_at(step + 1);
#pragma unroll
      for (int m = 0; m < S; ++m) {
        float B[STEP];
        load_quad(tile + (4 * m + q) * COLUMN + step * STEP, B);
#pragma unroll
        for (int v = 0; v < V; ++v)
#pragma unroll
          for (int k = 0; k < STEP; ++k)
            h[m][v] = fmaf(exp2_approx(delta[k][v] * A[v][m]), h[m][v], delta_x[k][v] * B[k]);
        store_quad(after + 4 * m * STATE_ROW, h[m]);
      }
    }

#pragma unroll 1
    for (int step = last; step >= 0; --step) {
      int first = i0 + step * STEP, left = count - step * STEP;
      const io* own_x = x_at + step * STEP * WARP;
      Raw<1> raw_dout[STEP], raw_dt[STEP], raw_z[STEP] = {};
      float own_dy[STEP], slope[STEP];  // slope: d Delta / d dt
#pragma unroll
      for (int k = 0; k < STEP; ++k) {
        int at = (step * STEP + k) * WARP;
        load(raw_dout[k], dout_at + at), load(raw_dt[k], dt_at + at);
        if (GATED) load(raw_z[k], z_at + at);
      }
#pragma unroll
      for (int k = 0; k < STEP; ++k) {
        own_dy[k] = raw_dout[k][0];
        slope[k] = SOFTPLUS ? sigmoid(raw_dt[k][0] + bias) : 1.0f;
      }
      if (GATED) {
        float dz[STEP];
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
          float z = raw_z[k][0], sz = sigmoid(z);
          dz[k] = own_dy[k] * silu_slope(z, sz) * sum[k];
          own_dy[k] *= z * sz;
        }
        if (writes_dz) {
          auto dz_at = dz_walk.moved(first);
#pragma unroll
          for (int k = 0; k < STEP; ++k, dz_at.move(1))
            if (live && k < left) dz_at[0] = from_float(dz[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < STEP; ++k) {
        edge[k * EDGE] = live && k < left ? own_dy[k] : 0.0f;
        edge[k * EDGE + WARP] = slope[k];
      }
      __syncwarp();
      if (step > 0) fetch_sum(step - 1);
      float dy[STEP][V], sums[STEP][2 * V] = {};  // sums: s1 and s2 of each channel, side by side
#pragma unroll
      for (int k = 0; k < STEP; ++k) load_quad(edge - q + k * EDGE, dy[k]);
      load_step(step);
      const float* before = state_at(step);
      __syncwarp();
      // The warp's dB and dC take the place of Delta x: value lane / 4 of dBC is dB of the step's tokens, then dC.
      float* dBC_out = rows + (step * STEP + lane / 4 % STEP) * ROW + WARP + lane / 16 * STATES + q;

#pragma unroll
      for (int m = 0; m < S; ++m) {
        if (4 * m >= state) break;  // also keeps the compiler from mixing states, which costs registers
        float B[STEP], C[STEP], dBC[2 * STEP] = {}, now[V];
        load_quad(tile + (4 * m + q) * COLUMN + step * STEP, B);
        load_quad(tile + (STATES + 4 * m + q) * COLUMN + step * STEP, C);
        load_quad(before + 4 * m * STATE_ROW, now);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          float decay[STEP], decayed[STEP];
#pragma unroll
          for (int k = 0; k < STEP; ++k) {
            decay[k] = exp2_approx(delta[k][v] * A[v][m]);
            decayed[k] = decay[k] * now[v];
            now[v] = fmaf(delta_x[k][v], B[k], decayed[k]);
            dBC[STEP + k] = fmaf(dy[k][v], now[v], dBC[STEP + k]);
          }
#pragma unroll
          for (int k = STEP - 1; k >= 0; --k) {
            float g = fmaf(dy[k][v], C[k], carry[v][m]), w = g * decayed[k];
            carry[v][m] = g * decay[k];
            dBC[k] = fmaf(g, delta_x[k][v], dBC[k]);
            sums[k][2 * v] = fmaf(g, B[k], sums[k][2 * v]);
            sums[k][2 * v + 1] = fmaf(w, A[v][m], sums[k][2 * v + 1]);
            dA[v][m] = fmaf(w, delta[k][v], dA[v][m]);
          }
        }
        scatter_sum<2 * STEP, 16, 4>(dBC, lane);
        dBC_out[4 * m] = dBC[0];
      }
      auto dx_at = dx_walk.moved(first), ddt_at = ddt_walk.moved(first);
#pragma unroll
      for (int k = 0; k < STEP; ++k, dx_at.move(1), ddt_at.move(1)) {
        scatter_sum<2 * V, 2, 1>(sums[k], lane);  // s1, s2 of this lane's channel; zeros of an absent token
        float dy_now = edge[k * EDGE], x = to_float(own_x[k * WARP]), own_delta = rows[(step * STEP + k) * ROW + lane];
        float ddt = fmaf(x, sums[k][0], sums[k][1] * LN2) * edge[k * EDGE + WARP];
        float dx = fmaf(own_delta, sums[k][0], SKIPS ? skip * dy_now : 0.0f);
        if (live && k < left) dx_at[0] = from_float(dx), ddt_at[0] = from_float(ddt);
        dD = fmaf(dy_now, x, dD);
        dbias += ddt;
      }
    }

    __syncthreads();
#pragma unroll 2
    for (int e = 4 * threadIdx.x; e < count * 2 * STATES; e += 4 * WARPS * WARP) {
      int i = e / (2 * STATES), n = e % STATES;
      float total[4] = {};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        float part[4];
        load_quad(tile + BLOCK_FLOATS + w * WARP_FLOATS + i * ROW + WARP + e % (2 * STATES), part);
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] += part[j];
      }
      int t = d.reverse ? length - 1 - (i0 + i) : i0 + i;
      float* partial = e % (2 * STATES) < STATES ? d.dB : d.dC;
      partial += ((blockIdx.y * s.batch + b) * s.length + t) * s.state + n;
      if (state % 4 == 0) {
        if (n < state) store_quad(partial, total);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (n + j < state) partial[j] = total[j];
      }
    }
    base = next;
  }

#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int m = 0; m < S; ++m)
      if (c4 + v < s.channels && 4 * m + q < s.state)
        d.dA[(b * s.channels + c4 + v) * s.state + 4 * m + q] = dA[v][m];
  if (live && d.dD) d.dD[b * s.channels + c] = dD;
  if (live && d.ddt_bias) d.ddt_bias[b * s.channels + c] = dbias;
}

// The backward pass of scan.cu, which has the notation and the pieces.
#pragma once

//   g_t  = dy_t C_t + a_{t+1} g_{t+1}     w_t = g_t (a_t h_{t-1})     dB_t = sum_c g_t Delta_t x_t
//   s1_t = sum_n g_t B_t                  s2_t = sum_n w_t A          dC_t = sum_c dy_t h_t
//   dx_t = Delta_t s1_t + D dy_t          dA = sum_t w_t Delta_t      ddt_t = (x_t s1_t + s2_t) sigmoid(dt_t + bias)
//
// Chunks run backwards from the kept states. A first sweep over the chunk leaves the state before every step of
// STEP tokens in shared memory; the steps then run backwards, and in each the states one after the other: decays
// and a h_{t-1} of one state of four channels and STEP tokens are all that has to be in registers.
//
// A warp has 32 channels and all states: lane 4 j + q holds the states n = 4 m + q of channels 4 j ... 4 j + 3.
// Outside the recurrence a lane has two neighbouring channels of every second token. What a chunk reads is copied to
// shared memory while the chunk behind it is worked on.
//
// ONE_STRETCH: the states of a step are one stretch of instructions, in which exponentials hide behind sums. Elsewhere
// branches part them, because one stretch needs more registers than there are. ALIGNED implies that N = STATES.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr bool ONE_STRETCH = ALIGNED && FULL && GATED && SKIPS && WARPS == 4 && STATES == 16 && IO == 2;
#else
constexpr bool ONE_STRETCH = false;
#endif
constexpr int V = 4, S = STATES / 4, STEP = 4, STEPS = CHUNK / STEP;

// Shared memory. Of the block: B and C of the chunk as floats, [2 STATES][COLUMN], token innermost; and as they come,
// [2][B, C][CHUNK][STATES]. Of a warp: Delta [32] and Delta x [32] of every token, the latter making room for dB and dC
// [2 STATES] when it is spent; dy and d Delta / d dt of a step, [STEP][2][32]; a ring of states [STATES][32], before
// each step of the chunk, where the one before the last step makes room for the one before the next chunk; sums of each
// lane, 8 rows of [32][4]; x, dt, dout and z, [2][4][CHUNK][32], as they come.
constexpr int COLUMN = CHUNK + 4, ROW = WARP + (2 * STATES > WARP ? 2 * STATES : WARP), EDGE = 2 * WARP;
constexpr int STATE_FLOATS = STATES * WARP, RING = STEPS;
constexpr int SUMS_ROW = 4 * WARP, SUMS_FLOATS = 8 * SUMS_ROW + 12;  // 8 quads of each lane
constexpr int STREAM = CHUNK * WARP, BC_STREAM = CHUNK * STATES;  // of one tensor, in io
constexpr int TILE_FLOATS = 2 * STATES * COLUMN;
constexpr int BLOCK_FLOATS = TILE_FLOATS + 4 * BC_STREAM * (int)sizeof(io) / 4;
constexpr int WARP_FLOATS =
    CHUNK * ROW + STEP * EDGE + RING * STATE_FLOATS + SUMS_FLOATS + 8 * STREAM * (int)sizeof(io) / 4;

__device__ __forceinline__ void load_quad(const float* p, float (&v)[4]) {
  float4 f = *(const float4*)p;
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}

__device__ __forceinline__ void store_quad(float* p, const float (&v)[4]) { *(float4*)p = {v[0], v[1], v[2], v[3]}; }

__device__ __forceinline__ void load_pair(const float* p, float (&v)[2]) {
  float2 f = *(const float2*)p;
  v[0] = f.x, v[1] = f.y;
}

__device__ __forceinline__ void store_pair(float* p, const float (&v)[2]) { *(float2*)p = {v[0], v[1]}; }

__device__ __forceinline__ void write_pair(io* p, const float (&v)[2], const bool (&live)[2]) {
  if (ALIGNED) {
    if (live[0]) store(p, v);
  } else {
    if (live[0]) p[0] = from_float(v[0]);
    if (live[1]) p[1] = from_float(v[1]);
  }
}

// Where state n of a warp's channel lies in the ring: no two lanes of a quarter of a warp meet in a bank.
__device__ __forceinline__ int state_index(int n, int channel) { return n * WARP + (channel ^ n % 4 * 8); }

constexpr int AT_ONCE = ALIGNED ? 32 : 4;  // copies; loads need registers

// Copies CHUNK tokens of COLUMNS channels from channel c0 on; absent tokens and channels read others of the same rows.
// Part `part` of `parts` threads takes its share. ALIGNED: rows begin and end on borders of 16 bytes, and CHUNK of them
// lie within 2^31 bytes. `whole`: no token is absent.
template <int COLUMNS>
__device__ __forceinline__ void copy_chunk(io* to, const Scan& s, const Direction& d, const Rows& rows, int64 b, int c0,
                                           int channels, int i0, int part, int parts, bool whole) {
  constexpr int EACH = ALIGNED ? 16 / sizeof(io) : 1, PIECES = COLUMNS / EACH;
  if (ALIGNED && whole) {
    const char* low = rows.data + b * rows.batch_stride + (d.reverse ? s.length - i0 - CHUNK : i0) * rows.row_stride;
    int row = (int)rows.row_stride;
#pragma unroll
    for (int e = 0; e < CHUNK * PIECES; e += parts) {
      int i = (e + part) / PIECES, piece = (e + part) % PIECES * EACH;
      if (CHUNK * PIECES % parts && e + part >= CHUNK * PIECES) break;
      int c = FULL || COLUMNS != WARP ? c0 + piece : min(c0 + piece, channels - EACH);
      unsigned offset = (d.reverse ? CHUNK - 1 - i : i) * row + c * (int)sizeof(io);
      copy_async(to + i * COLUMNS + piece, low + offset);
    }
  } else {
    int last = min(i0 + CHUNK, (int)s.length) - 1;
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
}

// The state at the start of a chunk, to a ring's slot.
__device__ __forceinline__ void copy_state(float* to, const float* from, int state, int channels, int c0, int lane) {
  constexpr int EACH = ALIGNED ? 4 : 1, PIECES = WARP / EACH;
#pragma unroll AT_ONCE
  for (int e = 0; e < STATES * PIECES; e += WARP) {
    int n = (e + lane) / PIECES, piece = (e + lane) % PIECES * EACH;
    int column = FULL ? c0 + piece : min(c0 + piece, channels - EACH);
    const float* at = (const float*)((const char*)from + (unsigned)(n * channels + column) * 4u);
    if (ALIGNED) copy_async(to + state_index(n, piece), at);
    else to[state_index(n, piece)] = n < state ? *at : 0.0f;
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_backward(const __grid_constant__ Scan s) {
  float* tile = (float*)dynamic_shared;
  io* BC_stream = (io*)(tile + TILE_FLOATS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, q = lane % 4;
  float* rows = tile + BLOCK_FLOATS + warp * WARP_FLOATS;
  float* edge = rows + CHUNK * ROW;
  float* ring = rows + CHUNK * ROW + STEP * EDGE;
  float* sums_at = ring + RING * STATE_FLOATS;
  io* stream = (io*)(sums_at + SUMS_FLOATS);

  const Direction& d = s.direction[blockIdx.z];
  int64 b = blockIdx.x;
  int c0 = blockIdx.y * (WARPS * WARP) + warp * WARP, c4 = c0 + lane - q;  // first of the warp and of the lane's quad
  int length = s.length, channels = s.channels, state = s.state, chunks = (length + CHUNK - 1) / CHUNK;
  // Outside the recurrence: a lane has the channels c and c + 1 of every second token, those of parity `half`.
  int half = lane / 16, own = lane % 16 * 2, c = c0 + own;
  bool live[2] = {FULL || c < channels, FULL || c + 1 < channels};
  int near[2] = {live[0] ? c : channels - 1, live[1] ? c + 1 : channels - 1};
  // Outputs: the first token in scan order, and the bytes to the next.
  int row = channels * (int)sizeof(io), down = d.reverse ? -row : row;
  int64 origin = (b * length + (d.reverse ? length - 1 : 0)) * row + c * (int)sizeof(io);
  keep(origin), keep(down);
  char *dx_at = (char*)d.dx + origin, *ddt_at = (char*)d.ddt + origin, *dz_at = (char*)s.dz + origin;
  const char* sum_at = (const char*)s.pregate + origin * (4 / (int)sizeof(io));
  bool writes_dz = GATED && blockIdx.z == 0;
  float bias[2], skip[2], dD[2] = {}, dbias[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) bias[e] = optional(d.dt_bias, near[e]), skip[e] = optional(d.D, near[e]);
  float A[V][S], carry[V][S], dA[V][S];
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int m = 0; m < S; ++m) A[v][m] = scaled_A(s, d, c4 + v, 4 * m + q), carry[v][m] = dA[v][m] = 0.0f;

  // Copies what the chunk reads.
  auto prepare = [&](int chunk, bool whole) {
    int i0 = chunk * CHUNK;
    io *to = stream + chunk % 2 * 4 * STREAM, *BC = BC_stream + chunk % 2 * 2 * BC_STREAM;
    copy_chunk<WARP>(to, s, d, d.x, b, c0, channels, i0, lane, WARP, whole);
    copy_chunk<WARP>(to + STREAM, s, d, d.dt, b, c0, channels, i0, lane, WARP, whole);
    copy_chunk<WARP>(to + 2 * STREAM, s, d, s.dout, b, c0, channels, i0, lane, WARP, whole);
    if (GATED) copy_chunk<WARP>(to + 3 * STREAM, s, d, s.z, b, c0, channels, i0, lane, WARP, whole);
    copy_chunk<STATES>(BC, s, d, d.B, b, 0, state, i0, threadIdx.x, WARPS * WARP, whole);
    copy_chunk<STATES>(BC + BC_STREAM, s, d, d.C, b, 0, state, i0, threadIdx.x, WARPS * WARP, whole);
  };
  auto prepare_state = [&](int chunk, float* to) {  // the state that it starts from
    copy_state(to, d.states + (b * chunks + chunk) * state * s.channels, state, channels, c0, lane);
  };
  int base = 0;  // of the ring: the state before the chunk
  prepare(chunks - 1, false);
  prepare_state(chunks - 1, ring);

  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    int i0 = chunk * CHUNK, count = min(CHUNK, length - i0), last = (count - 1) / STEP;
    copies_done();
    __syncthreads();
    int next = base ? base - 1 : RING - 1;
    if (chunk > 0) prepare(chunk - 1, true);

    const io *x_at = stream + chunk % 2 * 4 * STREAM + own, *BC = BC_stream + chunk % 2 * 2 * BC_STREAM;
    const io *dt_at = x_at + STREAM, *dout_at = x_at + 2 * STREAM, *z_at = x_at + 3 * STREAM;
#pragma unroll 4
    for (int e0 = 0; e0 < 2 * BC_STREAM; e0 += WARPS * WARP) {
      int e = e0 + threadIdx.x, n = e % STATES, i = e / STATES % CHUNK;
      tile[(n + e / BC_STREAM * STATES) * COLUMN + i] = i < count && n < state ? to_float(BC[e]) : 0.0f;
    }
    // Loads, sums and stores apart: the compiler moves no load across a store to shared memory.
#pragma unroll 1
    for (int i1 = 0; i1 < CHUNK; i1 += CHUNK / 2) {
      constexpr int TOKENS = CHUNK / 4;
      Raw<2> x[TOKENS], dt[TOKENS];
      float step_of[TOKENS][2];
#pragma unroll
      for (int k = 0; k < TOKENS; ++k) {
        int at = (i1 + 2 * k + half) * WARP;
        load(x[k], x_at + at), load(dt[k], dt_at + at);
      }
#pragma unroll
      for (int k = 0; k < TOKENS; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) step_of[k][e] = time_step(dt[k][e] + bias[e]);
#pragma unroll
      for (int k = 0; k < TOKENS; ++k) {
        int i = i1 + 2 * k + half;
        float delta[2], delta_x[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          bool there = live[e] && i < count;
          delta[e] = there ? step_of[k][e] : 0.0f;
          delta_x[e] = there ? step_of[k][e] * x[k][e] : 0.0f;
        }
        store_pair(rows + i * ROW + own, delta);
        store_pair(rows + i * ROW + WARP + own, delta_x);
      }
    }
    float sum[STEP / 2][2] = {};  // of the step to come
    auto fetch_sum = [&](int step) {
      if (!writes_dz) return;
#pragma unroll
      for (int k = 0; k < STEP / 2; ++k) {
        int i = i0 + min(step * STEP + 2 * k + half, count - 1);
        auto from = (const float*)(sum_at + (int64)i * (down * (4 / (int)sizeof(io))));
        if (ALIGNED) {
          if (live[0]) load_pair(from, sum[k]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (live[e]) sum[k][e] = from[e];
        }
      }
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
      return ring + (slot < RING ? slot : slot - RING) * STATE_FLOATS + state_index(q, lane - q);
    };

    float h[S][V];
#pragma unroll
    for (int m = 0; m < S; ++m) load_quad(state_at(0) + 4 * m * WARP, h[m]);
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
        store_quad(after + 4 * m * WARP, h[m]);
      }
    }

#pragma unroll 1
    for (int step = last; step >= 0; --step) {
      int first = i0 + step * STEP + half;
      float decay[V][STEP];  // of the states to come: the special-function unit works while sums are made
      auto decays = [&](int v, int m) {
#pragma unroll
        for (int k = 0; k < STEP; ++k) decay[v][k] = exp2_approx(delta[k][v] * A[v][m]);
      };
      Raw<2> raw_dout[STEP / 2], raw_dt[STEP / 2], raw_z[STEP / 2] = {};
      float own_dy[STEP / 2][2], slope[STEP / 2][2];  // slope: d Delta / d dt
      bool there[STEP / 2];
#pragma unroll
      for (int k = 0; k < STEP / 2; ++k) {
        int at = (step * STEP + 2 * k + half) * WARP;
        load(raw_dout[k], dout_at + at), load(raw_dt[k], dt_at + at);
        if (GATED) load(raw_z[k], z_at + at);
        there[k] = first + 2 * k < length;
      }
#pragma unroll
      for (int k = 0; k < STEP / 2; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          own_dy[k][e] = raw_dout[k][e];
          slope[k][e] = SOFTPLUS ? sigmoid(raw_dt[k][e] + bias[e]) : 1.0f;
        }
      if (GATED) {
        float dz[STEP / 2][2];
#pragma unroll
        for (int k = 0; k < STEP / 2; ++k)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float z = raw_z[k][e], sz = sigmoid(z);
            dz[k][e] = own_dy[k][e] * silu_slope(z, sz) * sum[k][e];
            own_dy[k][e] *= z * sz;
          }
        if (writes_dz) {
#pragma unroll
          for (int k = 0; k < STEP / 2; ++k)
            if (there[k]) write_pair((io*)(dz_at + (int64)(first + 2 * k) * down), dz[k], live);
        }
      }
#pragma unroll
      for (int k = 0; k < STEP / 2; ++k) {
#pragma unroll
        for (int e = 0; e < 2; ++e) own_dy[k][e] = live[e] && there[k] ? own_dy[k][e] : 0.0f;
        store_pair(edge + (2 * k + half) * EDGE + own, own_dy[k]);
        store_pair(edge + (2 * k + half) * EDGE + WARP + own, slope[k]);
      }
      __syncwarp();
      if (step > 0) fetch_sum(step - 1);
      float dy[STEP][V], sums[STEP][2 * V] = {};  // sums: s1 and s2 of each channel, side by side
#pragma unroll
      for (int k = 0; k < STEP; ++k) load_quad(edge + k * EDGE + lane - q, dy[k]);
      load_step(step);
      const float* before = state_at(step);
      __syncwarp();
#pragma unroll
      for (int v = 0; v < V; ++v) decays(v, 0);
#pragma unroll
      for (int m0 = 0; m0 < S; m0 += 4) {
#pragma unroll
        for (int m = m0; m < m0 + 4; ++m) {
          if (!ONE_STRETCH && m > 0 && 4 * m >= state) break;
          float B[STEP], C[STEP], dBC[2 * STEP] = {}, now[V];
          load_quad(tile + (4 * m + q) * COLUMN + step * STEP, B);
          load_quad(tile + (STATES + 4 * m + q) * COLUMN + step * STEP, C);
          load_quad(before + 4 * m * WARP, now);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            float decayed[STEP];
#pragma unroll
            for (int k = 0; k < STEP; ++k) {
              decayed[k] = decay[v][k] * now[v];
              now[v] = fmaf(delta_x[k][v], B[k], decayed[k]);
              dBC[STEP + k] = fmaf(dy[k][v], now[v], dBC[STEP + k]);
            }
#pragma unroll
            for (int k = STEP - 1; k >= 0; --k) {
              float g = fmaf(dy[k][v], C[k], carry[v][m]), w = g * decayed[k];
              carry[v][m] = g * decay[v][k];
              dBC[k] = fmaf(g, delta_x[k][v], dBC[k]);
              sums[k][2 * v] = fmaf(g, B[k], sums[k][2 * v]);
              sums[k][2 * v + 1] = fmaf(w, A[v][m], sums[k][2 * v + 1]);
              dA[v][m] = fmaf(w, delta[k][v], dA[v][m]);
            }
            if (m + 1 < S) decays(v, m + 1);
          }
          // Four quads of dB and dC of 4 states, summed over the 8 lanes that have the same states: a lane takes dB or
          // dC of one state, and leaves it where Delta x was. The order of the lanes avoids bank conflicts.
          store_quad(sums_at + 2 * (m % 4) * SUMS_ROW + 4 * lane, *(const float(*)[4])dBC);
          store_quad(sums_at + (2 * (m % 4) + 1) * SUMS_ROW + 4 * lane, *(const float(*)[4])(dBC + STEP));
        }
        __syncwarp();
        int odd = lane / 4 % 2;
        const float* from = sums_at + lane / 4 * SUMS_ROW + 4 * q;
        float parts[WARP / 4][STEP];
#pragma unroll
        for (int j = 0; j < WARP / 4; ++j) load_quad(from + 16 * (j % 2 ? j - odd : j + odd), parts[j]);
        float* to = rows + step * STEP * ROW + WARP + odd * STATES + 4 * (m0 + lane / 8) + q;
#pragma unroll
        for (int k = 0; k < STEP; ++k) {
          float total = parts[0][k];
#pragma unroll
          for (int j = 1; j < WARP / 4; ++j) total += parts[j][k];
          to[k * ROW] = total;
        }
        __syncwarp();
      }
      // s1 and s2 of four tokens, summed over the 4 lanes that have the same channels.
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          *(float4*)(sums_at + v * (2 * SUMS_ROW + 4) + k * SUMS_ROW + 4 * lane) = {
              sums[k][2 * v], sums[k][2 * v + 1], sums[k + 2][2 * v], sums[k + 2][2 * v + 1]};
      __syncwarp();
      float s12[2][4];  // of each channel: s1 and s2 of this lane's first token, then of its second
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float* from = sums_at + (own % 4 + e) * (2 * SUMS_ROW + 4) + half * SUMS_ROW + own / 4 * 16;
        int odd = own / 8 % 2;
        load_quad(from + 4 * odd, s12[e]);
#pragma unroll
        for (int j = 1; j < 4; ++j) {
          float part[4];
          load_quad(from + 4 * (j % 2 ? j - odd : j + odd), part);
#pragma unroll
          for (int i = 0; i < 4; ++i) s12[e][i] += part[i];
        }
      }
      float step_dD[2] = {};
#pragma unroll
      for (int k = 0; k < STEP / 2; ++k) {
        int i = step * STEP + 2 * k + half;
        float dy_now[2], slope_now[2], own_delta[2], ddt[2], dx[2];
        load_pair(edge + (2 * k + half) * EDGE + own, dy_now);
        load_pair(edge + (2 * k + half) * EDGE + WARP + own, slope_now);
        load_pair(rows + i * ROW + own, own_delta);
        Raw<2> x;
        load(x, x_at + i * WARP);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float s1 = s12[e][2 * k], s2 = s12[e][2 * k + 1];  // zeros of an absent token
          ddt[e] = fmaf(x[e], s1, s2 * LN2) * slope_now[e];
          dx[e] = fmaf(own_delta[e], s1, SKIPS ? skip[e] * dy_now[e] : 0.0f);
          step_dD[e] = fmaf(dy_now[e], x[e], step_dD[e]);
          dbias[e] += ddt[e];
        }
        if (first + 2 * k < length) {
          int64 at = (int64)(first + 2 * k) * down;
          write_pair((io*)(dx_at + at), dx, live), write_pair((io*)(ddt_at + at), ddt, live);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) dD[e] += step_dD[e];
      // The state before the chunk's last step is spent, or there is none.
      if (step == last && chunk > 0) prepare_state(chunk - 1, ring + next * STATE_FLOATS);
    }

    __syncthreads();
#pragma unroll 1
    for (int e0 = 0; e0 < CHUNK * 2 * STATES; e0 += 4 * WARPS * WARP) {
      int e = e0 + 4 * threadIdx.x, i = e / (2 * STATES), n = e % STATES;
      if (i >= count) break;
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
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    dD[e] += __shfl_xor_sync(ALL, dD[e], 16), dbias[e] += __shfl_xor_sync(ALL, dbias[e], 16);
    if (half == 0 && live[e] && d.dD) d.dD[b * s.channels + c + e] = dD[e];
    if (half == 0 && live[e] && d.ddt_bias) d.ddt_bias[b * s.channels + c + e] = dbias[e];
  }
}

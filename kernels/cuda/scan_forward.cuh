// The forward pass of scan.cu, which has the notation and the pieces.
#pragma once

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

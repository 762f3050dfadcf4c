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

#include "scan_forward.cuh"
#include "scan_backward.cuh"

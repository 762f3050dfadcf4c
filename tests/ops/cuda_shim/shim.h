// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fibre that runs until it meets a barrier
// or a shuffle. Included before a kernel source, it stands in for primitives.cuh and for CUDA's built-ins.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using std::max;
using std::min;

#define DIS_SSM_PRIMITIVES
#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define dynamic_shared (shim::shared)

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct dim3 { unsigned x, y, z; };
static dim3 threadIdx, blockIdx, blockDim;

namespace shim {

constexpr size_t STACK = 256 << 10;
constexpr unsigned char CANARY = 0xA5;

struct Barrier {
  unsigned arrived = 0, generation = 0;
  int kind = 0;
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done;
  Barrier* waits;
  unsigned generation;
  unsigned parity;  // of the next shuffle
  std::vector<std::pair<void*, const void*>> copies;  // not yet done
};

static float4* shared;
static std::vector<Fibre> fibres;
static std::vector<Barrier> barriers;  // of each warp, then of the block
static std::vector<float> slots[2];
static ucontext_t scheduler;
static unsigned current;
static std::string error;
static void (*body)(const void*);
static const void* body_arguments;

static void entry() {
  body(body_arguments);
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}

// Waits until all `size` threads of the barrier are there, at the same kind of call.
static void wait(Barrier& barrier, unsigned size, int kind) {
  if (barrier.arrived && barrier.kind != kind) error = "threads of a warp or block stand at different barriers";
  barrier.kind = kind;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fibre& self = fibres[current];
  self.waits = &barrier, self.generation = barrier.generation;
  swapcontext(&self.context, &scheduler);
}

// The turns of `count` warps or lanes: upwards, downwards, or shuffled.
static std::vector<unsigned> turns(unsigned count, int order) {
  std::vector<unsigned> turn(count);
  for (unsigned i = 0; i < count; ++i) turn[i] = order == 1 ? count - 1 - i : i;
  unsigned seed = order;
  for (unsigned i = count - 1; order > 1 && i > 0; --i) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(turn[i], turn[(seed >> 8) % (i + 1)]);
  }
  return turn;
}

// A warp runs as far as it can before the next has its turn, so that a missing barrier shows.
static void run_block(unsigned threads, int order) {
  barriers.assign(threads / 32 + 1, Barrier());
  for (unsigned i = 0; i < threads; ++i) {
    Fibre& f = fibres[i];
    f.done = false, f.waits = nullptr, f.parity = 0, f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, entry, 0);
  }
  auto lanes = turns(32, order), warps = turns(threads / 32, order);
  auto run_warp = [&](unsigned warp, unsigned& left) {
    bool progress = false;
    for (unsigned lane : lanes) {
      unsigned i = warp * 32 + lane;
      Fibre& f = fibres[i];
      if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
      f.waits = nullptr;
      current = i;
      threadIdx = {i, 0, 0};
      progress = true;
      swapcontext(&scheduler, &f.context);
      left -= f.done;
    }
    return progress;
  };
  for (unsigned left = threads; left && error.empty();) {
    bool progress = false;
    for (unsigned warp : warps)
      while (error.empty() && run_warp(warp, left)) progress = true;
    if (!progress) error = "deadlock: some threads never reach the barrier";
  }
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::barriers.back(), blockDim.x, 0); }
inline void __syncwarp() { shim::wait(shim::barriers[threadIdx.x / 32], 32, 0); }

typedef long long int64;
inline void keep(int64&) {}
inline void keep(int&) {}

// As late as the GPU may: when the thread waits for its copies.
inline void copy_async(void* to, const void* from) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) shim::error = "copies 16 bytes to or from between their borders";
  shim::fibres[shim::current].copies.emplace_back(to, from);
}
inline void copies_done() {
  auto& copies = shim::fibres[shim::current].copies;
  for (auto [to, from] : copies) std::memcpy(to, from, 16);
  copies.clear();
}

inline float __shfl_xor_sync(unsigned mask, float value, int other) {
  if (mask != 0xffffffffu) shim::error = "only whole warps may shuffle";
  auto& slots = shim::slots[shim::fibres[shim::current].parity++ % 2];
  unsigned lane = threadIdx.x;
  slots[lane] = value;
  shim::wait(shim::barriers[lane / 32], 32, other);
  return slots[lane ^ other];
}

inline float __fdividef(float a, float b) { return a / b; }

inline float exp2_approx(float x) {
  float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // flushes denormals, keeps NaN
}

inline float half_to_float(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return h;
}

inline unsigned short float_to_half(float x) {
  _Float16 h = x;
  unsigned short bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

inline float bfloat16_to_float(unsigned short bits) {
  unsigned wide = (unsigned)bits << 16;
  float y;
  std::memcpy(&y, &wide, 4);
  return y;
}

inline unsigned short float_to_bfloat16(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

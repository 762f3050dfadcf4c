// The few GPU instructions that C++ has no name for. Tests on the CPU put host functions in their place.
#ifndef DIS_SSM_PRIMITIVES
#define DIS_SSM_PRIMITIVES

extern __shared__ float4 dynamic_shared[];

typedef long long int64;

// 2^x within 2 ulp; 0 and denormals of the result become 0, inf and NaN pass.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float bfloat16_to_float(unsigned short bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ unsigned short float_to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// The compiler takes v for unknown: it keeps the value in a register instead of computing it again and again.
__device__ __forceinline__ void keep(int64& v) { asm("" : "+l"(v)); }
__device__ __forceinline__ void keep(int& v) { asm("" : "+r"(v)); }

// Copies 16 aligned bytes from global to shared memory in the background; copies_done waits for this thread's.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(__cvta_generic_to_global(from)) : "memory");
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

// Warp-level primitives: tensor-core products, transposing loads, and the hardware's exponential. For sm_75 and newer.
//
// tests/helpers/cuda_on_cpu defines these functions for a CPU.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace copgen {

#ifdef __CUDACC__

// c += a b, with a 16 x 8 and b 8 x 8 of fp16. With q = lane % 4, a lane holds of a the columns 2q, 2q + 1 of rows
// lane / 4 (a0) and lane / 4 + 8 (a1), of b the rows 2q, 2q + 1 of column lane / 4, and of c the columns 2q, 2q + 1
// of row lane / 4 (c[0], c[1]) and of row lane / 4 + 8 (c[2], c[3]).
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// Four 8 x 8 matrices of fp16, transposed into the layout of multiply_add's b. Lane l points to row l % 8 (16 bytes
// of shared memory) of matrix l / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&b)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// 2^x within 2 units in the last place; 0 where that is below the normal floats.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as two fp16, the first in the low half.
__device__ __forceinline__ uint32_t pack(float x, float y) {
  const __half2 both = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

#else

void multiply_add(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b);
void load_transposed(uint32_t (&b)[4], const void* row);
float power_of_two(float x);
uint32_t pack(float x, float y);

#endif

// exp(x)
__device__ __forceinline__ float exponential(float x) { return power_of_two(1.4426950408889634f * x); }

}  // namespace copgen

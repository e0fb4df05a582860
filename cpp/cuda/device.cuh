// SPDX-License-Identifier: Apache-2.0
// The instructions that kernels use beyond CUDA C++: asynchronous copies, fragments, and the 1-bit product of the
// tensor cores (sm_80 and later). tests/cpp/emulation has the same functions for the host.
#pragma once

#ifdef BITMILL_EMULATED_CUDA
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "floats.h"

namespace bitmill::cuda {

// A kernel's shared memory is one struct; the launch says its size.
template <class T>
__device__ inline T& shared_memory() {
  extern __shared__ __align__(128) unsigned char bitmill_shared[];
  return *reinterpret_cast<T*>(bitmill_shared);
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 4 or 16 bytes from global to shared memory, or as many zeros if they are not `present`; both addresses are multiples
// of their number. Copies belong to the group that the next close_copies() closes.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global, bool present) {
  const int read = present ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read));
  } else {
    static_assert(bytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(read));
  }
}
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::); }
// Until all of this thread's groups but the last `groups_left` have arrived.
template <int groups_left>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// Four matrices of 8 rows of 16 bytes: lane l gives the address of row l % 8 of matrix l / 8, and words[i] becomes word
// l % 4 of row l / 4 of matrix i.
__device__ inline void load_matrices(uint32_t (&words)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// sum += popcount(a & b) of 16 rows and 8 columns of 256 bits. With g = lane / 4 and t = lane % 4, a holds words t and
// t + 4 of rows g and g + 8 (a[0]: g, t; a[1]: g + 8, t; a[2]: g, t + 4; a[3]: g + 8, t + 4), b words t and t + 4 of
// column g, sum rows g (0, 1) and g + 8 (2, 3) of columns 2 t and 2 t + 1.
__device__ inline void multiply_bits(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum += a b for 16 rows and 8 columns of 32 products of int8. With g and t as above, a holds fours of neighbours 4 t
// and 4 t + 16 of rows g and g + 8 (a[0]: g, 4 t; a[1]: g + 8, 4 t; a[2]: g, 4 t + 16; a[3]: g + 8, 4 t + 16), b those
// of column g; sum is placed as above.
__device__ inline void multiply_int8(int32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// sum += a b for 16 rows and 8 columns of 16 products of bfloat16 or float16, added as floats. With g and t as above, a
// holds pairs of neighbours 2 t and 2 t + 8 of rows g and g + 8 (a[0]: g, 2 t; a[1]: g + 8, 2 t; a[2]: g, 2 t + 8;
// a[3]: g + 8, 2 t + 8), b those of column g; sum is placed as above.
template <class Half>
__device__ inline void multiply_halves(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Half, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Exact conversions in one instruction.
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Float16 x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

}  // namespace bitmill::cuda
#endif

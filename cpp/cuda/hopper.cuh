// SPDX-License-Identifier: Apache-2.0
// What Hopper has beyond device.cuh, in code for compute capability 9.0a: barriers in shared memory that count bytes,
// copies by TMA, and asynchronous products of bits (wgmma). tests/cpp/emulation has the same functions for the host.
#pragma once

#include "device.cuh"

#ifdef BITMILL_EMULATED_CUDA
#include "emulated_hopper.h"
#define BITMILL_ON_HOPPER
#else

#include <cuda.h>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BITMILL_ON_HOPPER
#endif

namespace bitmill::cuda {

// In shared memory. A phase is over after so many arrivals, and when the bytes that were announced have come.
struct PhaseBarrier {
  uint64_t state;
};

__device__ inline void init_barrier(PhaseBarrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals));
}
// After the last init, by the thread that did it, before the block meets.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(PhaseBarrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
// Arrives, and announces bytes of copies.
__device__ inline void arrive_for_bytes(PhaseBarrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; the one before the first counts as over, with parity 1.
__device__ inline void wait(PhaseBarrier& barrier, unsigned parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// A matrix of words in global memory, of which boxes of `rows` rows of 32 words are copied.
using WordMatrix = CUtensorMap;

// cuTensorMapEncodeTiled, which the CUDA runtime finds in the driver; or null.
inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? function : nullptr);
  }();
  return encoder;
}
inline bool describe(const int32_t* words, int64_t height, int64_t width, unsigned rows, WordMatrix& matrix) {
  const auto encode = tensor_map_encoder();
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height)};
  const cuuint64_t strides[] = {4 * sizes[0]};
  const cuuint32_t box[] = {32, rows}, steps[] = {1, 1};
  return encode && encode(&matrix, CU_TENSOR_MAP_DATA_TYPE_INT32, 2, const_cast<int32_t*>(words), sizes, strides, box,
                          steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// A box to shared memory at a multiple of 1024 bytes; what lies outside of the matrix comes as 0. The 16 bytes at place
// c of row r go to place c ^ r % 8. All bytes of the box count.
__device__ inline void copy_box(void* to, const WordMatrix& matrix, int word, int row, PhaseBarrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(&matrix), "r"(word), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}
// Bytes as they are, a multiple of 16.
__device__ inline void copy_bytes(void* to, const void* from, unsigned bytes, PhaseBarrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// How the tensor cores find a box: K-major, swizzled by 128 bytes, 1024 bytes from 8 rows to the next.
using Box = uint64_t;
__device__ inline Box box_at(const void* shared) {
  const uint64_t address = shared_address(shared);
  return (address & 0x3FFFF) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// What products read and write in registers is theirs from begin_products to end_products.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// sum += popcount(a & b) for 64 left rows and the 128 rows of a box, of the 256 columns that begin at word 8 step. Of
// four warps, which call this together, warp w has the left rows 16 w ...: a is placed as in multiply_bits, and sum
// holds as many as 16 of those, one for each 8 rows of the box.
__device__ inline void multiply_box(int32_t (&sum)[64], const uint32_t (&a)[4], Box rows, int step) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k256.s32.b1.b1.and.popc "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1;"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3]), "+r"(sum[4]), "+r"(sum[5]), "+r"(sum[6]), "+r"(sum[7]),
        "+r"(sum[8]), "+r"(sum[9]), "+r"(sum[10]), "+r"(sum[11]), "+r"(sum[12]), "+r"(sum[13]), "+r"(sum[14]),
        "+r"(sum[15]), "+r"(sum[16]), "+r"(sum[17]), "+r"(sum[18]), "+r"(sum[19]), "+r"(sum[20]), "+r"(sum[21]),
        "+r"(sum[22]), "+r"(sum[23]), "+r"(sum[24]), "+r"(sum[25]), "+r"(sum[26]), "+r"(sum[27]), "+r"(sum[28]),
        "+r"(sum[29]), "+r"(sum[30]), "+r"(sum[31]), "+r"(sum[32]), "+r"(sum[33]), "+r"(sum[34]), "+r"(sum[35]),
        "+r"(sum[36]), "+r"(sum[37]), "+r"(sum[38]), "+r"(sum[39]), "+r"(sum[40]), "+r"(sum[41]), "+r"(sum[42]),
        "+r"(sum[43]), "+r"(sum[44]), "+r"(sum[45]), "+r"(sum[46]), "+r"(sum[47]), "+r"(sum[48]), "+r"(sum[49]),
        "+r"(sum[50]), "+r"(sum[51]), "+r"(sum[52]), "+r"(sum[53]), "+r"(sum[54]), "+r"(sum[55]), "+r"(sum[56]),
        "+r"(sum[57]), "+r"(sum[58]), "+r"(sum[59]), "+r"(sum[60]), "+r"(sum[61]), "+r"(sum[62]), "+r"(sum[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows + 2 * step));
}

}  // namespace bitmill::cuda
#endif

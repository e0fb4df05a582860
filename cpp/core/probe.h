// SPDX-License-Identifier: Apache-2.0
// What this machine could reach at best: the measures that benchmarks hold the kernels against. One thread each; run
// them in several threads at once for the peak of several cores.
#pragma once

#include <cstdint>

namespace bitmill {

// Multiply-adds a second of nothing but the arithmetic, on registers. 0 where this machine or this build has no such
// instructions: 1-bit operands (xor, popcount, add with AVX-512 VPOPCNTDQ; table lookup, add with AVX2), fused
// multiply-adds of float32 (AVX-512, or AVX2 and FMA), dot products of bfloat16 (AVX512_BF16) and of int8 (AVX512_VNNI;
// with AVX2 pairs of products added in 16 bits).
double popcount_peak();
double float32_peak();
double bfloat16_peak();
double int8_peak();

// Bytes a second of a sequential read, and bytes copied a second, of the caller's memory: from DRAM if `bytes` is far
// above the last cache. Whole words of 8 bytes are read.
double read_bandwidth(const void* data, int64_t bytes);
double copy_bandwidth(void* to, const void* from, int64_t bytes);

// Median seconds of one integer product of packed rows [m, k] and n x k weight bits into the caller's buffer,
// one thread, on the instruction set in use: the kernel alone, without the cost of calling an op.
double binary_matmul_seconds(int64_t m, int64_t n, int64_t k, int repeats);

namespace detail {
double popcount_peak_avx512();
double float32_peak_avx512();
double popcount_peak_avx2();
double float32_peak_avx2();
double int8_peak_avx2();
double bfloat16_peak_avx512bf16();
double int8_peak_avx512vnni();
}  // namespace detail

}  // namespace bitmill

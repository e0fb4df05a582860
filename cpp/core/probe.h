// SPDX-License-Identifier: Apache-2.0
// What this core could reach at best: the measure that benchmarks hold the kernels against.
#pragma once

#include <cstdint>

namespace bitmill {

// Bit multiply-adds a second of xor + popcount + add on registers, one thread; 0 without a vector popcount.
double popcount_peak();

// Median seconds of one integer product of packed rows [m, k] and n x k weight bits into the caller's buffer,
// one thread, on the instruction set in use: the kernel alone, without the cost of calling an op.
double binary_matmul_seconds(int64_t m, int64_t n, int64_t k, int repeats);

namespace detail {
double popcount_peak_avx512();
}  // namespace detail

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// What this core could reach at best: the measure that benchmarks hold the kernels against.
#pragma once

namespace bitmill {

// Bit multiply-adds a second of xor + popcount + add on registers, one thread; 0 without a vector popcount.
double popcount_peak();

namespace detail {
double popcount_peak_avx512();
}  // namespace detail

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// The loop of every arithmetic probe. Included by one file per instruction set, so everything is static.
#pragma once

#include <chrono>
#include <cstdint>

namespace bitmill::detail {

// Steps a second of `step`, which changes the register it is given and hides the change from the compiler. 14 chains
// cover the latency of every instruction probed, and fit in the 16 registers of AVX2 beside one constant.
template <class Vector, class Step>
static inline double steps_per_second(const Vector start, Step step) {
  constexpr int kChains = 14;
  constexpr int64_t kRounds = 150000;
  Vector a = start, b = start, c = start, d = start, e = start, f = start, g = start;
  Vector h = start, i = start, j = start, k = start, l = start, m = start, n = start;
  double best = 0.0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < kRounds; ++round) {
      step(a), step(b), step(c), step(d), step(e), step(f), step(g);
      step(h), step(i), step(j), step(k), step(l), step(m), step(n);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    const double rate = kChains * kRounds / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace bitmill::detail

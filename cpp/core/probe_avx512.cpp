// SPDX-License-Identifier: Apache-2.0
// 16 independent chains of xor, popcount and add on 512-bit registers: nothing but the arithmetic of binary_matmul.
#include <immintrin.h>

#include <chrono>
#include <cstdint>

#include "probe.h"

namespace bitmill::detail {
namespace {

void chain(__m512i& sum, __m512i& bits) {
  __m512i different = _mm512_xor_si512(sum, bits);
  asm volatile("" : "+v"(different));  // the xor must stay in the loop
  sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(different));
  asm volatile("" : "+v"(sum));
}

}  // namespace

double popcount_peak_avx512() {
  constexpr int kChains = 16;
  constexpr int64_t kRounds = 400000;
  __m512i bits = _mm512_set1_epi32(0x5A5A5A5A);
  __m512i a = bits, b = bits, c = bits, d = bits, e = bits, f = bits, g = bits, h = bits;
  __m512i i = bits, j = bits, k = bits, l = bits, m = bits, n = bits, o = bits, p = bits;
  double best = 0.0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < kRounds; ++round) {
      chain(a, bits), chain(b, bits), chain(c, bits), chain(d, bits);
      chain(e, bits), chain(f, bits), chain(g, bits), chain(h, bits);
      chain(i, bits), chain(j, bits), chain(k, bits), chain(l, bits);
      chain(m, bits), chain(n, bits), chain(o, bits), chain(p, bits);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double rate = 512.0 * kChains * kRounds / seconds.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace bitmill::detail

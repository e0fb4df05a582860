// SPDX-License-Identifier: Apache-2.0
// The probes: the peaks of this machine, and the binary product alone.
#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "binary_matmul.h"
#include "cpu.h"
#include "layout.h"

namespace bitmill {

double popcount_peak() {
#ifdef BITMILL_AVX512
  if (available(InstructionSet::avx512)) return detail::popcount_peak_avx512();
#endif
#ifdef BITMILL_AVX2
  if (available(InstructionSet::avx2)) return detail::popcount_peak_avx2();
#endif
  return 0.0;
}

double float32_peak() {
#ifdef BITMILL_AVX512
  if (available(InstructionSet::avx512)) return detail::float32_peak_avx512();
#endif
#ifdef BITMILL_AVX2
  if (available(InstructionSet::avx2)) return detail::float32_peak_avx2();
#endif
  return 0.0;
}

double bfloat16_peak() {
#ifdef BITMILL_AVX512
  if (available(InstructionSet::avx512) && has_bf16_dot()) return detail::bfloat16_peak_avx512bf16();
#endif
  return 0.0;
}

double int8_peak() {
#ifdef BITMILL_AVX512
  if (available(InstructionSet::avx512) && has_int8_dot()) return detail::int8_peak_avx512vnni();
#endif
#ifdef BITMILL_AVX2
  if (available(InstructionSet::avx2)) return detail::int8_peak_avx2();
#endif
  return 0.0;
}

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double read_bandwidth(const void* data, int64_t bytes) {
  const auto* words = static_cast<const uint64_t*>(data);
  const auto start = std::chrono::steady_clock::now();
  uint64_t sum[8] = {};                              // of one, a sum takes longer than memory
  for (int64_t i = 0; i + 8 <= bytes / 8; i += 8) {  // the hardware prefetches a plain stream best
    for (int64_t j = 0; j < 8; ++j) sum[j] += words[i + j];
  }
  asm volatile("" : : "r"(sum) : "memory");
  return static_cast<double>(bytes) / seconds_since(start);
}

double copy_bandwidth(void* to, const void* from, int64_t bytes) {
  const auto start = std::chrono::steady_clock::now();
  std::memcpy(to, from, static_cast<size_t>(bytes));
  asm volatile("" : : "r"(to) : "memory");
  return static_cast<double>(bytes) / seconds_since(start);
}

double binary_matmul_seconds(int64_t m, int64_t n, int64_t k, int repeats) {
  struct alignas(64) Line {
    int32_t words[16];
  };
  auto random_lines = [state = 1u](int64_t words) mutable {
    std::vector<Line> lines(ceil_div(std::max<int64_t>(words, 1), 16));
    for (Line& line : lines) {
      for (int32_t& word : line.words) word = static_cast<int32_t>(state = state * 1664525u + 1013904223u);
    }
    return lines;
  };
  const std::vector<Line> a = random_lines(m * word_count(k));
  const std::vector<Line> weight = random_lines(tile_count(n) * word_count(k) * kTileRows);
  std::vector<Line> dot = random_lines(m * n);
  BinaryMatmulParams p;
  p.a = a.data()->words;
  p.weight = weight.data()->words;
  p.m = m;
  p.n = n;
  p.k = k;
  p.dot = dot.data()->words;
  std::vector<double> seconds(std::max(repeats, 1));
  for (double& result : seconds) {
    const auto start = std::chrono::steady_clock::now();
    binary_matmul(p);
    result = seconds_since(start);
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// Elementwise kernels: a thread has a unit of 8 neighbouring columns. Threads of a block are dealt to as many short
// rows as they serve; a longer row has blocks of its own.
#pragma once

#include "launch.cuh"
#include "philox.h"
#include "rows.cuh"

namespace bitmill::cuda {

inline constexpr int kUnitThreads = 256;
inline constexpr int64_t kUnit = 8;

struct UnitGrid {
  int64_t m, units;
  int threads_log = 2;  // of a row, in one block; at least 4
  unsigned blocks_across;

  // Rows of k columns, of which the last unit may lie beyond, so that `units_together` of them are never parted.
  UnitGrid(int64_t m_, int64_t k, int64_t units_together = 1)
      : m(m_), units(ceil_div(k, kUnit * units_together) * units_together) {
    while (1 << threads_log < kUnitThreads && 1 << threads_log < units) ++threads_log;
    blocks_across = static_cast<unsigned>(ceil_div(units, kUnitThreads));
  }
  int64_t blocks() const { return blocks_across > 1 ? m * blocks_across : ceil_div(m, kUnitThreads >> threads_log); }
};

struct Unit {
  int64_t row, index;
  bool inside;  // the others go along, and neither read nor write
};
__device__ inline Unit unit_of(const UnitGrid& grid) {
  const auto thread = static_cast<unsigned>(threadIdx.x);
  int64_t row = blockIdx.x, index = thread;
  if (grid.blocks_across > 1) {
    row = blockIdx.x / grid.blocks_across;
    index += int64_t{blockIdx.x % grid.blocks_across} * kUnitThreads;
  } else {
    row = row * (kUnitThreads >> grid.threads_log) + (thread >> grid.threads_log);
    index &= (1 << grid.threads_log) - 1;
  }
  return {row, index, row < grid.m && index < grid.units};
}

// The bits of 8 magnitudes' largest; infinity and NaN lie above all others.
__device__ inline uint32_t largest_magnitude(const float (&x)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (const float value : x) {
    const uint32_t magnitude = std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}
// That of neighbouring lanes, a power of two.
__device__ inline uint32_t largest_of_lanes(uint32_t largest, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, largest, distance);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// The random numbers of 8 elements, the first of which has this index in row-major order.
__device__ inline void random_words(RandomStream stream, uint64_t first, uint32_t (&random)[8]) {
  const auto skipped = static_cast<unsigned>(first % 4);
  uint32_t word[12] = {};
#pragma unroll
  for (int block = 0; block < 3; ++block) {
    if (block == 2 && skipped == 0) break;
    const PhiloxBlock words = philox(first / 4 + block, stream);
#pragma unroll
    for (int i = 0; i < 4; ++i) word[4 * block + i] = words.word[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    random[i] = skipped == 0 ? word[i] : skipped == 1 ? word[i + 1] : skipped == 2 ? word[i + 2] : word[i + 3];
  }
}

// 8 codes of 4 bits as the bytes of a packed row, of which `left` are inside; `aligned`: to is a multiple of 4.
__device__ inline void store_codes(uint8_t* to, int64_t left, bool aligned, uint32_t codes) {
  if (aligned && left >= 4) {
    *reinterpret_cast<uint32_t*>(to) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < left) to[i] = static_cast<uint8_t>(codes >> 8 * i);
  }
}
__device__ inline uint32_t load_codes(const uint8_t* from, int64_t left, bool aligned) {
  if (aligned && left >= 4) return *reinterpret_cast<const uint32_t*>(from);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) codes |= i < left ? uint32_t{from[i]} << 8 * i : 0u;
  return codes;
}

// 8 neighbours, of which `left` are inside the row; `aligned`: to is a multiple of 16 bytes.
__device__ inline void store8(float* to, int64_t left, bool aligned, const float (&value)[8]) {
  if (aligned && left >= 8) {
    reinterpret_cast<float4*>(to)[0] = {value[0], value[1], value[2], value[3]};
    reinterpret_cast<float4*>(to)[1] = {value[4], value[5], value[6], value[7]};
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < left) to[i] = value[i];
  }
}

}  // namespace bitmill::cuda

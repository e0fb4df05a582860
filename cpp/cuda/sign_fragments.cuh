// SPDX-License-Identifier: Apache-2.0
// Floats times signs on the tensor cores: a tile of 16 outputs is the left operand, made of its bits in registers with
// two instructions for two weights, up to 8 rows of activations are the right one. Columns may meet in any order, so
// columns c and c + 16 of a word are neighbours there: their bits are one shift away from two signs. Float32
// activations are three bfloat16 that add up to them, so every product is exact, and sums are those of floats.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "device.cuh"
#include "launch.cuh"
#include "layout.h"
#include "rows.cuh"

namespace bitmill::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kWordsAtOnce = 4;  // that a warp reads and then multiplies

template <class T>
using Half = std::conditional_t<std::is_same_v<T, float>, BFloat16, T>;

template <class T>
inline constexpr int kParts = std::is_same_v<T, float> ? 3 : 1;

// Two values as one register of each part.
template <class T>
__device__ inline void split_pair(T first, T second, uint32_t (&pair)[kParts<T>]) {
  if constexpr (sizeof(T) == 2) {
    pair[0] = first.bits | static_cast<uint32_t>(second.bits) << 16;
  } else {
#pragma unroll
    for (uint32_t& part : pair) {  // cut, not rounded: 8 bits each time leave nothing after three
      const uint32_t low = std::bit_cast<uint32_t>(first) & 0xFFFF0000u;
      const uint32_t high = std::bit_cast<uint32_t>(second) & 0xFFFF0000u;
      part = low >> 16 | high;
      first = fabsf(first) == INFINITY ? 0.0f : first - std::bit_cast<float>(low);
      second = fabsf(second) == INFINITY ? 0.0f : second - std::bit_cast<float>(high);
    }
  }
}

// Columns column ... column + 3 of a row of x [m, k], each with the one 16 further on; 0 outside. `aligned`: rows begin
// at multiples of 4 elements.
template <class T>
__device__ inline void load_pairs(const T* x, int64_t row, int64_t m, int64_t column, int64_t k, bool aligned,
                                  uint32_t (&pair)[4][kParts<T>]) {
  const int64_t left = row < m ? k - column : 0;
  if (left > 0) x += row * k + column;
  T low[4], high[4];
  load4(x, left, aligned, low);
  load4(x + (left > 16 ? 16 : 0), left - 16, aligned, high);
#pragma unroll
  for (int c = 0; c < 4; ++c) split_pair(low[c], high[c], pair[c]);
}

// Columns c and c + 16 of a word of signs as -1 or +1, or 0 where `present` has no bit.
template <class T, bool zeros>
__device__ inline uint32_t sign_pair(uint32_t word, uint32_t present, int c) {
  constexpr uint32_t kMinusOnes = std::is_same_v<Half<T>, BFloat16> ? 0xBF80BF80u : 0xBC00BC00u;
  const uint32_t signs = (word << (15 - c) & 0x80008000u) ^ kMinusOnes;
  return zeros ? signs & (present >> c & 0x00010001u) * 0xFFFFu : signs;
}

// The shared memory of add_warps.
template <int fragments>
struct WarpSums {
  float sum[kWarps][kTileRows][8 * fragments];
};

// Adds the warps' sums of a tile of 16 outputs and 8 `fragments` rows: store(row, output, sum) for each inside.
template <int fragments, class Store>
__device__ inline void add_warps(const float (&total)[fragments][4], int64_t first_row, int64_t m, int64_t tile,
                                 int64_t n, const Store& store) {
  auto& shared = shared_memory<WarpSums<fragments>>();
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
#pragma unroll
  for (int j = 0; j < fragments; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.sum[warp][lane / 4 + i / 2 * 8][8 * j + 2 * (lane % 4) + i % 2] = total[j][i];
  }
  __syncthreads();
  for (int i = thread; i < 8 * fragments * kTileRows; i += kThreads) {
    const int64_t row = first_row + i / kTileRows, output = tile * kTileRows + i % kTileRows;
    if (row >= m || output >= n) continue;
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w) value += shared.sum[w][i % kTileRows][i / kTileRows];
    store(row, output, value);
  }
}

}  // namespace bitmill::cuda

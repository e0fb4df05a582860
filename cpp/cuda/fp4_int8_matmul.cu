// SPDX-License-Identifier: Apache-2.0
// int8 activations times FP4 weights on the tensor cores. A tile of 16 outputs is the left operand: the 8 codes of a
// word become 8 bytes by looking them up in registers, 4 at a time. Columns may meet in any order, so a lane has the 8
// of its word in both operands. Without groups, warps share the columns; with groups each counts some of them, and the
// sums are then scaled and added first to last, as core adds them.
#include "binary_output.cuh"
#include "device.cuh"
#include "fp4_matmul.h"
#include "launch.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / static_cast<int>(kWarp);
constexpr int kStepsAtOnce = 4;  // of a warp, with groups
constexpr int64_t kColumns = 32;

// Groups of `width` columns, or 0: one group; 8 `fragments` rows of activations.
template <int width, int fragments>
struct Int8Shared {
  static constexpr int kGroups = width == 16 ? 2 : 1;  // of a step
  static constexpr int kParts = width == 0 ? kWarps : kWarps * kStepsAtOnce * kGroups;
  static constexpr int kRows = 8 * fragments;
  int32_t dot[kParts][kTileRows][kRows + 2];  // padded, so that rows begin in different banks
};

// Bytes of four codes, the lowest ones of a word.
__device__ uint32_t four_integers(const uint32_t (&table)[4], uint32_t codes) {
  const uint32_t low = __byte_perm(table[0], table[1], codes), high = __byte_perm(table[2], table[3], codes);
  const uint32_t upper = __byte_perm(0xFF00u, 0u, codes >> 3 & 0x1111u);  // where a code is 8 or above
  return (low & ~upper) | (high & upper);
}

// 8 neighbours of a row, of which `left` are inside; the others are 0.
__device__ void load_integers(const int8_t* x, int64_t left, bool aligned, uint32_t (&word)[2]) {
  if (aligned && left >= 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(x);
    word[0] = words.x, word[1] = words.y;
    return;
  }
  word[0] = word[1] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < left) word[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(x[i])) << i % 4 * 8;
  }
}

// What core adds to a row's sum for one group.
__device__ float term_of(const Fp4MatmulParams& p, float unit, int64_t row, int64_t output, int64_t group,
                         int64_t groups, int32_t dot) {
  const auto total = static_cast<float>(dot);
  const float scale = weight_scale(p.weight, output * groups + group) * unit;
  return scale * (p.grouped_rows ? p.row_scale[row * groups + group] * total : total);
}

template <int width, int fragments>
__global__ void __launch_bounds__(kThreads)
    fp4_int8_mma_kernel(Fp4MatmulParams p, const __grid_constant__ Fp4Integers integers, bool aligned) {
  using Shared = Int8Shared<width, fragments>;
  constexpr int kRows = Shared::kRows, kPairs = kTileRows * kRows;
  auto& shared = shared_memory<Shared>();
  const Fp4Weight& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group_lane = lane / 4, in_group = lane % 4;
  const auto tiles = static_cast<unsigned>(tile_count(w.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * kRows;
  const int64_t words = word_count(w.k, 4), steps = ceil_div(w.k, kColumns);
  const auto* codes = reinterpret_cast<const uint32_t*>(w.tiles) + tile * words * kTileRows;
  const auto* x = static_cast<const int8_t*>(p.x);
  uint32_t table[4];
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    table[i / 4] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) table[i / 4] |= static_cast<uint32_t>(integers.value[i + j] & 255) << 8 * j;
  }

  // Adds the products of 32 columns; with groups of 16, to the first half and the second.
  const auto multiply_step = [&](int64_t step, auto& sum) {
    const int64_t word = step * (kColumns / 8) + in_group, left = w.k - 8 * word;
    uint32_t a[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t eight = left > 0 ? codes[word * kTileRows + group_lane + 8 * half] : 0u;
      a[half] = four_integers(table, eight);
      a[half + 2] = four_integers(table, eight >> 16);
    }
#pragma unroll
    for (int j = 0; j < fragments; ++j) {
      const int64_t row = first_row + 8 * j + group_lane;
      const bool inside = row < p.m && left > 0;
      uint32_t b[2];
      load_integers(x + (inside ? row * w.k + 8 * word : 0), inside ? left : 0, aligned, b);
      if constexpr (width == 16) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool here = in_group / 2 == half;
          const uint32_t part[2] = {here ? b[0] : 0u, here ? b[1] : 0u};
          multiply_int8(sum[half][j], a, part);
        }
      } else {
        multiply_int8(sum[0][j], a, b);
      }
    }
  };
  const auto share = [&](int part, const int32_t (&sum)[fragments][4]) {
#pragma unroll
    for (int j = 0; j < fragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.dot[part][group_lane + i / 2 * 8][8 * j + 2 * in_group + i % 2] = sum[j][i];
      }
    }
  };
  const auto finish = [&](int64_t row, int64_t output, float sum) {
    float value = p.grouped_rows ? sum : sum * p.row_scale[row];
    if (p.bias) value += p.bias[output];
    store_as(p.dtype, p.out, row * w.n + output, value);
  };

  if constexpr (width == 0) {
    int32_t sum[1][fragments][4] = {};
    for (int64_t step = warp; step < steps; step += kWarps) multiply_step(step, sum);
    share(warp, sum[0]);
    __syncthreads();
    for (int i = thread; i < kPairs; i += kThreads) {
      const int lane_of_tile = i % kTileRows, r = i / kTileRows;
      const int64_t row = first_row + r, output = tile * kTileRows + lane_of_tile;
      if (row >= p.m || output >= w.n) continue;
      int32_t dot = 0;
      for (int part = 0; part < kWarps; ++part) dot += shared.dot[part][lane_of_tile][r];
      finish(row, output, 0.0f + term_of(p, integers.unit, row, output, 0, 1, dot));
    }
  } else {
    static_assert(kPairs <= kThreads);
    constexpr int kGroups = Shared::kGroups;
    const int64_t groups = ceil_div(w.k, width);
    const int lane_of_tile = thread % kTileRows, r = thread / kTileRows;
    const int64_t row = first_row + r, output = tile * kTileRows + lane_of_tile;
    const bool finishes = r < kRows && row < p.m && output < w.n;
    float total = 0.0f;
    for (int64_t pass = 0; pass < steps; pass += kWarps * kStepsAtOnce) {
#pragma unroll
      for (int i = 0; i < kStepsAtOnce; ++i) {
        const int place = warp * kStepsAtOnce + i;
        int32_t sum[kGroups][fragments][4] = {};
        if (pass + place < steps) multiply_step(pass + place, sum);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) share(place * kGroups + g, sum[g]);
      }
      __syncthreads();
      const int64_t first = pass * kGroups;
      for (int64_t group = first; finishes && group < groups && group < first + Shared::kParts; ++group) {
        total += term_of(p, integers.unit, row, output, group, groups, shared.dot[group - first][lane_of_tile][r]);
      }
      __syncthreads();
    }
    if (finishes) finish(row, output, total);
  }
}

template <int width, int fragments>
Status start(const Fp4MatmulParams& p, const Fp4Integers& integers, Stream stream) {
  using Shared = Int8Shared<width, fragments>;
  const int64_t blocks = tile_count(p.weight.n) * ceil_div(p.m, Shared::kRows);
  const bool aligned = p.weight.k % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 8 == 0;
  return launch(stream, fp4_int8_mma_kernel<width, fragments>, blocks, kThreads, sizeof(Shared), p, integers, aligned);
}

}  // namespace

Status launch_fp4_int8_matmul(const Fp4MatmulParams& p, const Fp4Integers& integers, Stream stream) {
  const Fp4Weight& w = p.weight;
  if (p.m < 0 || w.n < 0 || w.k < 0 || w.k > kMaxColumns) return Status::bad_size;
  const int64_t width = w.group_size > 0 ? w.group_size : w.k;
  const bool scales = p.m > 0 && (w.k > 0 || !p.grouped_rows);  // or there are none to point to
  if ((scales && !p.row_scale) || width > fp4_int8_columns(integers)) return Status::bad_argument;
  if (p.m == 0 || w.n == 0) return Status::ok;
  const bool few = p.m <= 8;
  switch (w.group_size) {
    case 0:
      return few ? start<0, 1>(p, integers, stream) : start<0, 4>(p, integers, stream);
    case 16:
      return few ? start<16, 1>(p, integers, stream) : start<16, 2>(p, integers, stream);
    case 32:
      return few ? start<32, 1>(p, integers, stream) : start<32, 2>(p, integers, stream);
    default:
      return Status::bad_argument;
  }
}

}  // namespace bitmill::cuda

// SPDX-License-Identifier: Apache-2.0
// Products of bits by counting them one word at a time: for few rows, where reading the weight is all the work, and for
// what the tensor cores do not multiply (scales of groups, weights with zeros).
#include "binary_matmul.h"
#include "binary_matmul_mma.cuh"
#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace bitmill::cuda {
namespace {

// So many rows are counted; reading 16 outputs of a weight once serves 4 of them.
constexpr int64_t kCountedRows = 8;

constexpr int kThreads = 128;
constexpr int kSlots = kThreads / 4;  // a slot is 4 threads, which read the 16 outputs of a word as 64 bytes

template <int rows>
struct CountShared {
  int32_t dot[kSlots][rows][kTileRows];
};

// One tile of 16 outputs and `rows` rows a block. Slots count words slot, slot + kSlots, ... of all columns; with
// groups each counts a whole group, kSlots groups at a time, and the sums are then scaled and added first to last.
template <Operand operand, bool weight_zeros, bool grouped, int rows>
__global__ void __launch_bounds__(kThreads) binary_matmul_count_kernel(BinaryMatmulParams p) {
  auto& shared = shared_memory<CountShared<rows>>();
  const int64_t words = word_count(p.k);
  const auto tiles = static_cast<unsigned>(tile_count(p.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * rows;
  const int quad = static_cast<int>(threadIdx.x) % 4, slot = static_cast<int>(threadIdx.x) / 4;
  const int64_t group_words = grouped ? p.group_size / 32 : words, groups = grouped ? ceil_div(words, group_words) : 1;

  const int lane = static_cast<int>(threadIdx.x) % kTileRows, finished = static_cast<int>(threadIdx.x) / kTileRows;
  const int64_t row = first_row + finished, column = tile * kTileRows + lane;
  const bool finishes = finished < rows && row < p.m && column < p.n;
  float sum = 0.0f;

  for (int64_t pass = 0; pass < groups; pass += kSlots) {
    const int64_t begin = grouped ? (pass + slot) * group_words : slot, step = grouped ? 1 : kSlots;
    const int64_t end = grouped && begin + group_words < words ? begin + group_words : words;
    int32_t dot[rows][4] = {};
    for (int64_t w = begin; w < end; w += step) {
      const int64_t at = (tile * words + w) * kTileRows + 4 * quad;
      const uint4 sign4 = *reinterpret_cast<const uint4*>(p.weight + at);
      const uint32_t weight[4] = {sign4.x, sign4.y, sign4.z, sign4.w};
      uint32_t weight_present[4];
      if constexpr (weight_zeros) {
        const uint4 present4 = *reinterpret_cast<const uint4*>(p.weight_nonzero + at);
        weight_present[0] = present4.x, weight_present[1] = present4.y;
        weight_present[2] = present4.z, weight_present[3] = present4.w;
      }
      const int64_t left = p.k - 32 * w;
      const uint32_t columns = left >= 32 ? ~0u : (1u << left) - 1;
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        if (first_row + r >= p.m) break;
        const int64_t word = (first_row + r) * words + w;
        const uint32_t a = static_cast<uint32_t>(p.a[word]);
        uint32_t present = columns;
        if constexpr (operand == Operand::ternary) present &= static_cast<uint32_t>(p.a_nonzero[word]);
        if constexpr (operand == Operand::bool_) present &= a;
        const int32_t all = __popc(present);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (weight_zeros) {
            const uint32_t mask = present & weight_present[i];
            dot[r][i] += __popc(mask) - 2 * __popc((a ^ weight[i]) & mask);
          } else {
            dot[r][i] += all - 2 * __popc((a ^ weight[i]) & present);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) shared.dot[slot][r][4 * quad + i] = dot[r][i];
    }
    __syncthreads();
    if constexpr (grouped) {
      for (int64_t group = pass; finishes && group < groups && group < pass + kSlots; ++group) {
        const float term = group_term(p, row, column, group, groups, shared.dot[group - pass][finished][lane]);
        sum = group == 0 ? term : sum + term;
      }
      __syncthreads();
    }
  }
  if constexpr (grouped) {
    if (finishes) store_sum(p, row, column, sum);
    return;
  }
  if (finished >= (rows > 1 ? rows : 2)) return;  // whole warps go on
  int32_t dot = 0;
  for (int s = 0; finishes && s < kSlots; ++s) dot += shared.dot[s][finished][lane];
  if (!p.bits.sign) {
    if (finishes) store_dot(p, row, column, dot);
    return;
  }
  const OutputBits bits = finishes ? output_bits(p.bits, p.n, column, dot) : OutputBits{false, false};
  const int half = static_cast<int>(threadIdx.x) % kWarp / kTileRows * kTileRows;
  const uint32_t sign = __ballot_sync(kAllLanes, bits.sign) >> half;
  const uint32_t nonzero = __ballot_sync(kAllLanes, bits.nonzero) >> half;
  if (lane != 0 || finished >= rows || row >= p.m) return;
  store_half_word(p.bits.sign, p.n, row, tile, sign);
  if (p.bits.nonzero) store_half_word(p.bits.nonzero, p.n, row, tile, nonzero);
}

template <Operand operand, bool weight_zeros, bool grouped, int rows>
Status count(const BinaryMatmulParams& p, Stream stream) {
  const int64_t blocks = tile_count(p.n) * ceil_div(p.m, rows);
  return launch(stream, binary_matmul_count_kernel<operand, weight_zeros, grouped, rows>, blocks, kThreads,
                sizeof(CountShared<rows>), p);
}

template <Operand operand, bool weight_zeros>
Status count(const BinaryMatmulParams& p, Stream stream, bool grouped) {
  if (p.m == 1) {
    return grouped ? count<operand, weight_zeros, true, 1>(p, stream)
                   : count<operand, weight_zeros, false, 1>(p, stream);
  }
  return grouped ? count<operand, weight_zeros, true, 4>(p, stream) : count<operand, weight_zeros, false, 4>(p, stream);
}

template <Operand operand>
Status count(const BinaryMatmulParams& p, Stream stream, bool grouped) {
  return p.weight_nonzero ? count<operand, true>(p, stream, grouped) : count<operand, false>(p, stream, grouped);
}

}  // namespace

Status launch_binary_matmul(const BinaryMatmulParams& p, Stream stream) {
  if (const Status status = check(p); status != Status::ok || p.m == 0 || p.n == 0) return status;
  if (!aligned16(p.weight) || !aligned16(p.weight_nonzero)) return Status::bad_argument;
  const bool grouped = !p.dot && !p.bits.sign && p.group_size > 0 && p.group_size < p.k;
  // From compute capability 10 on the tensor cores have no 1-bit product, and what replaces it is slower than counting.
  const int capability = p.m > kCountedRows ? current_device().compute_capability : 0;
  if (!grouped && !p.weight_nonzero && (capability == 8 || capability == 9)) {
#ifdef BITMILL_WGMMA
    if (capability == 9 && multiplies_wgmma(p)) return launch_binary_matmul_wgmma(p, stream);
#endif
    return launch_binary_matmul_mma(p, stream);
  }
  switch (p.operand) {
    case Operand::sign:
      return count<Operand::sign>(p, stream, grouped);
    case Operand::ternary:
      return count<Operand::ternary>(p, stream, grouped);
    case Operand::bool_:
      return count<Operand::bool_>(p, stream, grouped);
  }
  return Status::bad_argument;
}

}  // namespace bitmill::cuda

// SPDX-License-Identifier: Apache-2.0
// Floats times bits on the tensor cores (sign_fragments.cuh).
#include "binary_matmul.h"
#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "rows.cuh"
#include "sign_fragments.cuh"

namespace bitmill::cuda {
namespace {

// A tile of outputs and 8 `fragments` rows a block; every warp takes some words of the columns.
template <class T, bool zeros, int fragments>
__global__ void __launch_bounds__(kThreads)
    binary_weight_matmul_kernel(BinaryWeightMatmulParams p, Dtype out_dtype, bool aligned) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group_lane = lane / 4, in_group = lane % 4;
  const auto tiles = static_cast<unsigned>(tile_count(p.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * (8 * fragments);
  const int64_t words = word_count(p.k);
  const auto group_words = static_cast<unsigned>(p.group_size > 0 ? p.group_size / 32 : words);
  const int64_t groups = p.group_size > 0 ? ceil_div(p.k, p.group_size) : 1;
  const auto* weight = reinterpret_cast<const uint32_t*>(p.weight) + tile * words * kTileRows;
  const auto* present = reinterpret_cast<const uint32_t*>(p.weight_nonzero) + (zeros ? tile * words * kTileRows : 0);

  float sum[fragments][4] = {}, total[fragments][4] = {};
  int64_t group = -1;
  const auto close_group = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t output = tile * kTileRows + group_lane + 8 * half;
      const bool scaled = groups > 1 && group >= 0 && output < p.n;
      const float scale = scaled ? p.scale[output * groups + group] : 1.0f;  // the only one is multiplied by at the end
#pragma unroll
      for (int j = 0; j < fragments; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          total[j][i] = fmaf(scale, sum[j][i], total[j][i]);
          sum[j][i] = 0.0f;
        }
      }
    }
  };

  for (int64_t first = warp * kWordsAtOnce; first < words; first += kWarps * kWordsAtOnce) {
    // Lane t of each four reads word t of both of its outputs, and the others hear of it.
    uint32_t read[2] = {}, read_present[2] = {};
    if (first + in_group < words) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (first + in_group) * kTileRows + group_lane + 8 * half;
        read[half] = weight[at];
        if (zeros) read_present[half] = present[at];
      }
    }
#pragma unroll
    for (int i = 0; i < kWordsAtOnce; ++i) {
      const int64_t word = first + i;
      uint32_t signs[2], nonzero[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        signs[half] = __shfl_sync(kAllLanes, read[half], lane / 4 * 4 + i);
        if (zeros) nonzero[half] = __shfl_sync(kAllLanes, read_present[half], lane / 4 * 4 + i);
      }
      if (word >= words) break;  // the whole warp
      const int64_t group_of_word = static_cast<unsigned>(word) / group_words;
      if (group_of_word != group) {
        close_group();
        group = group_of_word;
      }
      uint32_t a[2][4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[c / 2][c % 2 * 2 + half] = sign_pair<T, zeros>(signs[half], nonzero[half], 4 * in_group + c);
        }
      }
#pragma unroll
      for (int j = 0; j < fragments; ++j) {
        uint32_t pair[4][kParts<T>];
        load_pairs(static_cast<const T*>(p.x), first_row + 8 * j + group_lane, p.m, 32 * word + 4 * in_group, p.k,
                   aligned, pair);
#pragma unroll
        for (int part = 0; part < kParts<T>; ++part) {
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const uint32_t b[2] = {pair[2 * step][part], pair[2 * step + 1][part]};
            multiply_halves<Half<T>>(sum[j], a[step], b);
          }
        }
      }
    }
  }
  close_group();
  add_warps(total, first_row, p.m, tile, p.n, [&](int64_t row, int64_t output, float value) {
    if (groups == 1) value *= p.scale[output];
    store_as(out_dtype, p.out, row * p.n + output, p.bias ? value + p.bias[output] : value);
  });
}

template <class T, bool zeros, int fragments>
Status start(const BinaryWeightMatmulParams& p, Dtype out_dtype, Stream stream) {
  const int64_t blocks = tile_count(p.n) * ceil_div(p.m, 8 * fragments);
  const bool aligned = aligned16(p.x) && p.k % 4 == 0;
  return launch(stream, binary_weight_matmul_kernel<T, zeros, fragments>, blocks, kThreads, sizeof(WarpSums<fragments>),
                p, out_dtype, aligned);
}

template <class T, bool zeros>
Status start(const BinaryWeightMatmulParams& p, Dtype out_dtype, Stream stream) {
  return p.m <= 8 ? start<T, zeros, 1>(p, out_dtype, stream) : start<T, zeros, 4>(p, out_dtype, stream);
}

}  // namespace

Status launch_binary_weight_matmul(const BinaryWeightMatmulParams& p, Stream stream, std::optional<Dtype> out_dtype) {
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.group_size < 0 || p.group_size % 32 != 0 || p.addend) return Status::bad_argument;
  if (p.m == 0 || p.n == 0) return Status::ok;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const Dtype out = out_dtype.value_or(p.dtype);
    return p.weight_nonzero ? start<T, true>(p, out, stream) : start<T, false>(p, out, stream);
  });
}

}  // namespace bitmill::cuda

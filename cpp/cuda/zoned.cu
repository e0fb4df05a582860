// SPDX-License-Identifier: Apache-2.0
// The zoned product on the tensor cores (sign_fragments.cuh). Activations are brought into the order in which the
// columns of a block are stored. A block then has two parts, its salient columns and the others, and in each the
// weights of an output are planes of signs times numbers: with t = -1, +1 for concentrated and sparse
//   not salient: 1, t, b1 and b1 t;   salient: 1, b2 and b1;   salient in two zones: 1, b2, b1, b1 t, t and b2 t.
#include <type_traits>

#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "sign_fragments.cuh"
#include "zoned.h"

namespace bitmill::cuda {
namespace {

__device__ int64_t block_end(const ZonedWeight& w, int64_t block) {
  return (block + 1) * w.block < w.k ? (block + 1) * w.block : w.k;
}

// Salient columns among the 32 from `column` on.
__device__ uint32_t salient_word(const ZonedWeight& w, int64_t column) {
  const int64_t left = w.k - column;
  return static_cast<uint32_t>(w.salient[column / 32]) & (left >= 32 ? ~0u : (1u << left) - 1);
}

__device__ float scale_at(const ZonedWeight& w, const void* scale, int64_t i) {
  if (w.scale_dtype == Dtype::f32) return static_cast<const float*>(scale)[i];
  return widen(static_cast<const Float16*>(scale)[i]);
}

// What the salient columns of every block take, by one block of threads; a thread has neighbouring blocks.
struct PlacesShared {
  int32_t columns[kThreads];
};
__global__ void __launch_bounds__(kThreads) zoned_places_kernel(ZonedWeight w, int64_t blocks, ZonedPlace* places) {
  auto& shared = shared_memory<PlacesShared>();
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = ceil_div(blocks, int64_t{kThreads}), first = thread * share;
  const int64_t last = first + share < blocks ? first + share : blocks;
  int32_t own = 0;
  for (int64_t block = first; block < last; ++block) {
    int32_t salient = 0;
    for (int64_t column = block * w.block; column < block_end(w, block); column += 32) {
      salient += __popc(salient_word(w, column));
    }
    places[block] = {salient, own};
    own += (salient + 7) / 8 * 8;
  }
  shared.columns[thread] = own;
  __syncthreads();
  int32_t before = 0;
  for (int i = 0; i < thread; ++i) before += shared.columns[i];
  for (int64_t block = first; block < last; ++block) places[block].zone_column += before;
}

// ordered[m, k]: x, times the scales of its columns, with the columns of a block as they are stored. A warp has a row's
// columns of a block.
template <class T, bool scaled>
using Ordered = std::conditional_t<scaled, float, T>;
template <class T, bool scaled>
__global__ void __launch_bounds__(kThreads)
    zoned_order_kernel(ZonedMatmulParams p, int64_t blocks, const ZonedPlace* places, Ordered<T, scaled>* ordered) {
  const ZonedWeight& w = p.weight;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, row = i / blocks, block = i % blocks;
  if (row >= p.m) return;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  int64_t salient = row * w.k + block * w.block, other = salient + places[block].salient;
  for (int64_t first = block * w.block; first < block_end(w, block); first += 32) {
    const uint32_t bits = salient_word(w, first);
    const int before = __popc(bits & ((1u << lane) - 1));
    const int64_t column = first + lane, to = bits >> lane & 1u ? salient + before : other + lane - before;
    if (column < w.k) {
      const T value = static_cast<const T*>(p.x)[row * w.k + column];
      if constexpr (scaled) {
        ordered[to] = widen(value) * scale_at(w, w.column_scale, column);
      } else {
        ordered[to] = value;
      }
    }
    salient += __popc(bits);
    other += 32 - __popc(bits);
  }
}

// The numbers of an output's planes in a part of a block: 1, the second plane, the first, first times zone, zone, and
// second times zone.
template <int planes>
__device__ void coefficients(const ZonedWeight& w, int64_t tile_block, int lane, bool salient,
                             float (&number)[planes]) {
  const int means = w.centred ? 1 : 0;
  float mu[2], alpha[2], beta[2];
#pragma unroll
  for (int zone = 0; zone < 2; ++zone) {
    const int first = salient ? 2 * (means + 1) + (w.split ? zone * (means + 2) : 0) : zone * (means + 1);
    const auto scale = [&](int i) {
      return scale_at(w, w.scale, (tile_block * w.scales() + first + i) * kTileRows + lane);
    };
    mu[zone] = w.centred ? scale(0) : 0.0f;
    alpha[zone] = scale(means);
    beta[zone] = salient ? scale(means + 1) : 0.0f;
  }
  const auto half_sum = [](const float (&of)[2]) { return 0.5f * of[0] + 0.5f * of[1]; };
  const auto half_difference = [](const float (&of)[2]) { return 0.5f * of[1] - 0.5f * of[0]; };
  number[0] = half_sum(mu);
  number[1] = salient ? half_sum(beta) : half_difference(mu);
  number[2] = half_sum(alpha);
  number[3] = half_difference(alpha);
  if constexpr (planes == 6) {
    number[4] = salient ? half_difference(mu) : 0.0f;
    number[5] = half_difference(beta);
  }
}

// The zones of an output's salient columns, 32 from `column` of salient_zone on.
__device__ uint32_t zone_word(const ZonedWeight& w, int64_t tile, int lane, int64_t column) {
  const auto word = [&](int64_t i) {
    return i < w.salient_zone_words
               ? static_cast<uint32_t>(w.salient_zone[(tile * w.salient_zone_words + i) * kTileRows + lane])
               : 0u;
  };
  const auto shift = static_cast<unsigned>(column % 32);
  const uint32_t low = word(column / 32) >> shift;
  return shift == 0 ? low : low | word(column / 32 + 1) << (32 - shift);
}

// A tile of outputs and 8 `fragments` rows a block; every warp takes some words of the columns.
template <class T, bool split, int fragments>
__global__ void __launch_bounds__(kThreads, 1)
    zoned_matmul_kernel(ZonedMatmulParams p, const ZonedPlace* places, const T* x, bool aligned) {
  constexpr int kPlanes = split ? 6 : 4;
  const ZonedWeight& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group_lane = lane / 4, in_group = lane % 4;
  const auto tiles = static_cast<unsigned>(tile_count(w.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * (8 * fragments);
  const auto words = static_cast<int>(word_count(w.k)), blocks = static_cast<int>(ceil_div(w.k, w.block));
  const auto block_words = static_cast<int>(w.block / 32);

  float sum[kPlanes][fragments][4] = {}, total[fragments][4] = {};
  int block = -1;        // whose sums they are,
  bool salient = false;  // and of which part
  const auto close_part = [&] {
    if (block < 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float number[kPlanes];
      coefficients(w, tile * blocks + block, group_lane + 8 * half, salient, number);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
        for (int j = 0; j < fragments; ++j) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            total[j][i] = fmaf(number[plane], sum[plane][j][i], total[j][i]);
            sum[plane][j][i] = 0.0f;
          }
        }
      }
    }
  };

  for (int first = warp * kWordsAtOnce; first < words; first += kWarps * kWordsAtOnce) {
    // Lane t of each four reads word t of both of its outputs, and the others hear of it.
    uint32_t read[2][2] = {};
    if (first + in_group < words) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (tile * words + first + in_group) * kTileRows + group_lane + 8 * half;
        read[0][half] = w.sign[at];
        read[1][half] = w.zone[at];
      }
    }
    for (int i = 0; i < kWordsAtOnce; ++i) {
      const int word = first + i;
      uint32_t one[2], two[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        one[half] = __shfl_sync(kAllLanes, read[0][half], lane / 4 * 4 + i);
        two[half] = __shfl_sync(kAllLanes, read[1][half], lane / 4 * 4 + i);
      }
      if (word >= words) break;  // the whole warp
      uint32_t pair[fragments][4][kParts<T>];
#pragma unroll
      for (int j = 0; j < fragments; ++j) {
        load_pairs(x, first_row + 8 * j + group_lane, p.m, 32 * word + 4 * in_group, w.k, aligned, pair[j]);
      }
      const int of = word / block_words, place = 32 * (word - of * block_words), left = places[of].salient - place;
      const uint32_t salient_columns = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const bool now_salient = part == 0;
        const uint32_t present = now_salient ? salient_columns : ~salient_columns;
        if (present == 0) continue;  // the whole warp
        if (of != block || now_salient != salient) {
          close_part();
          block = of;
          salient = now_salient;
        }
        const auto multiply = [&](float (&sums)[fragments][4], uint32_t low, uint32_t high) {
          const uint32_t signs[2] = {low, high};
          uint32_t a[2][4];
#pragma unroll
          for (int c = 0; c < 4; ++c) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              a[c / 2][c % 2 * 2 + half] = sign_pair<T, true>(signs[half], present, 4 * in_group + c);
            }
          }
#pragma unroll
          for (int j = 0; j < fragments; ++j) {
#pragma unroll
            for (int third = 0; third < kParts<T>; ++third) {
#pragma unroll
              for (int step = 0; step < 2; ++step) {
                const uint32_t b[2] = {pair[j][2 * step][third], pair[j][2 * step + 1][third]};
                multiply_halves<Half<T>>(sums[j], a[step], b);
              }
            }
          }
        };
        uint32_t zone[2] = {two[0], two[1]};
        if (split && salient) {
          const int64_t column = places[of].zone_column + place;
#pragma unroll
          for (int half = 0; half < 2; ++half) zone[half] = zone_word(w, tile, group_lane + 8 * half, column);
        }
        if (w.centred) multiply(sum[0], ~0u, ~0u);
        if (w.centred || salient) multiply(sum[1], two[0], two[1]);
        multiply(sum[2], one[0], one[1]);
        if (split || !salient) multiply(sum[3], ~(one[0] ^ zone[0]), ~(one[1] ^ zone[1]));
        if constexpr (split) {
          if (salient && w.centred) multiply(sum[4], zone[0], zone[1]);
          if (salient) multiply(sum[5], ~(two[0] ^ zone[0]), ~(two[1] ^ zone[1]));
        }
      }
    }
  }
  close_part();
  add_warps(total, first_row, p.m, tile, w.n, [&](int64_t row, int64_t output, float value) {
    store_as(p.dtype, p.out, row * w.n + output, p.bias ? value + p.bias[output] : value);
  });
}

template <bool split, int fragments, class T>
Status multiply(const ZonedMatmulParams& p, const ZonedPlace* places, const T* x, Stream stream) {
  const int64_t blocks = tile_count(p.weight.n) * ceil_div(p.m, 8 * fragments);
  const bool aligned = aligned16(x) && p.weight.k % 4 == 0;
  return launch(stream, zoned_matmul_kernel<T, split, fragments>, blocks, kThreads, sizeof(WarpSums<fragments>), p,
                places, x, aligned);
}

template <class T, bool scaled>
Status start(const ZonedMatmulParams& p, ZonedPlace* places, void* scratch, Stream stream) {
  auto* const ordered = static_cast<Ordered<T, scaled>*>(scratch);
  if (const int64_t blocks = ceil_div(p.weight.k, p.weight.block); blocks > 0) {
    Status status = launch(stream, zoned_places_kernel, 1, kThreads, sizeof(PlacesShared), p.weight, blocks, places);
    if (status != Status::ok) return status;
    status = launch(stream, zoned_order_kernel<T, scaled>, ceil_div(p.m * blocks, int64_t{kWarps}), kThreads, 0, p,
                    blocks, places, ordered);
    if (status != Status::ok) return status;
  }
  const bool few = p.m <= 8;
  if (p.weight.split) {
    return few ? multiply<true, 1>(p, places, ordered, stream) : multiply<true, 2>(p, places, ordered, stream);
  }
  return few ? multiply<false, 1>(p, places, ordered, stream) : multiply<false, 2>(p, places, ordered, stream);
}

}  // namespace

Status launch_zoned_matmul(const ZonedMatmulParams& p, ZonedPlace* places, void* ordered, Stream stream) {
  const ZonedWeight& w = p.weight;
  if (p.m < 0 || w.n < 0 || w.k < 0 || w.k > kMaxColumns) return Status::bad_size;
  if (w.block <= 0 || w.block % 32 != 0 || w.scale_dtype == Dtype::bf16) return Status::bad_argument;
  if (p.m == 0 || w.n == 0) return Status::ok;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    return w.column_scale ? start<T, true>(p, places, ordered, stream) : start<T, false>(p, places, ordered, stream);
  });
}

}  // namespace bitmill::cuda

// SPDX-License-Identifier: Apache-2.0
// Binary attention over packed bits. A block has 16 queries and 64 channels: every warp decides the maps of 4 queries,
// 32 keys at a time, one a lane, and all warps multiply the map with the values on the tensor cores, which count bits.
// No score is ever stored: what a rule must know of a whole row (its maximum, a sum of weights) is found in passes of
// their own, since counting again costs less than memory.
#include "binary_attention.cuh"
#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;        // of a block
constexpr int kRowsAtOnce = 4;   // of a warp
constexpr int kChunkWords = 32;  // of the map at a time
constexpr int kFragments = kChannels / 8 / (kThreads / static_cast<int>(kWarp));
constexpr int kLevels = 20;  // log2 of the most words of a map, and one more

struct AttentionShared {
  uint32_t map[kRows][kChunkWords + 4];  // padded, so that the rows of a fragment begin in different banks
  int32_t context[kRows][kChannels + 8];
  int32_t row_count[kRows];
  float addend[kRows];
  float partial[kLevels][kThreads];
};

__device__ int64_t weight_of(double x) {
  const double weight = exp(x) * detail::kWeightOne;
  return weight >= 0 ? static_cast<int64_t>(nearbyint(weight)) : 0;
}

// The larger one; a NaN stays.
template <class T>
__device__ T larger(T a, T b) {
  return a != a || a > b ? a : b;
}
template <class T>
__device__ T largest_of_warp(T value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// What a row's decision needs besides a dot product.
struct RowLimit {
  double top = 0;    // elastic: the largest score, or dot product without a bias
  double limit = 0;  // elastic: of a weight
  float least = 0;   // softmax_aware: of a score
};

template <bool zeros>
struct Rows {
  const AttentionView& view;
  const AttentionNumbers& numbers;
  bool biased;
  int lane;
  int64_t batch, first;  // the first query of the warp

  __device__ int64_t row(int r) const { return first + r < view.p.n ? first + r : view.p.n - 1; }

  __device__ void dots(int64_t word, int32_t (&dot)[kRowsAtOnce]) const {
    const int64_t key = 32 * word + lane;
#pragma unroll
    for (int32_t& d : dot) d = zeros ? 0 : static_cast<int32_t>(view.p.d);
    for (int64_t w = 0; w < view.words; ++w) {
      const int64_t k = (batch * view.words + w) * view.keys() + key;
      const uint32_t sign = view.k_sign[k], present = zeros ? view.k_nonzero[k] : ~0u;
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const int64_t q = (batch * view.p.n + row(r)) * view.words + w;
        if constexpr (zeros) {
          const uint32_t both = present & view.q_nonzero[q];
          dot[r] += __popc(both) - 2 * __popc((view.q_sign[q] ^ sign) & both);
        } else {
          dot[r] -= 2 * __popc(view.q_sign[q] ^ sign);
        }
      }
    }
  }

  __device__ bool attends(int r, int64_t word) const {
    if (!view.keep) return 32 * word + lane < view.p.m;
    const AttentionMask& mask = view.p.mask;
    const int64_t at = view.mask.at(batch) * mask.rows + (mask.rows > 1 ? row(r) : 0);
    return (view.keep[at * view.map_words + word] >> lane & 1u) != 0;
  }

  __device__ float bias(int r, int64_t word) const {
    const AttentionMask& mask = view.p.mask;
    const int64_t at = view.bias.at(batch) + (mask.rows > 1 ? row(r) : 0) * mask.values.row_stride +
                       (32 * word + lane) * mask.values.column_stride;
    if (mask.dtype == Dtype::f32) return static_cast<const float*>(mask.values.data)[at];
    if (mask.dtype == Dtype::bf16) return widen(static_cast<const BFloat16*>(mask.values.data)[at]);
    return widen(static_cast<const Float16*>(mask.values.data)[at]);
  }

  // Of an attended key.
  __device__ float score(int r, int64_t word, int32_t dot) const {
    const float score = detail::attention_score(view.p, dot);
    return biased ? score + bias(r, word) : score;
  }
  __device__ double wide_score(int r, int64_t word, int32_t dot) const {
    return biased ? numbers.slope * static_cast<double>(dot) + static_cast<double>(bias(r, word))
                  : static_cast<double>(dot);
  }
  __device__ int64_t weight(double score, double top) const {
    return weight_of(biased ? score - top : -numbers.slope * (top - score));
  }

  __device__ bool active(int r, int64_t word, int32_t dot, const RowLimit& limit) const {
    if (!attends(r, word)) return false;
    switch (view.p.rule) {
      case AttentionRule::bool_:
        return biased ? score(r, word, dot) > 0.0f : dot > 0;
      case AttentionRule::softmax_aware: {
        const float value = score(r, word, dot);
        return value >= limit.least && value > -INFINITY;
      }
      case AttentionRule::elastic:
        break;
    }
    return static_cast<double>(weight(wide_score(r, word, dot), limit.top)) > limit.limit;
  }

  __device__ void find_limits(RowLimit (&limit)[kRowsAtOnce]) const {
    if (view.p.rule == AttentionRule::bool_) return;
    const bool elastic = view.p.rule == AttentionRule::elastic;
    float top[kRowsAtOnce];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) top[r] = -INFINITY, limit[r].top = -INFINITY;
    for (int64_t word = 0; word < view.map_words; ++word) {
      int32_t dot[kRowsAtOnce];
      dots(word, dot);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (!attends(r, word)) continue;
        if (elastic) {
          limit[r].top = larger(limit[r].top, wide_score(r, word, dot[r]));
        } else {
          top[r] = larger(top[r], score(r, word, dot[r]));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (elastic) {
        limit[r].top = largest_of_warp(limit[r].top);
      } else {
        limit[r].least = largest_of_warp(top[r]) - view.p.gap;
      }
    }
    if (!elastic) return;
    int64_t sum[kRowsAtOnce] = {};
    for (int64_t word = 0; word < view.map_words; ++word) {
      int32_t dot[kRowsAtOnce];
      dots(word, dot);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        if (attends(r, word)) sum[r] += weight(wide_score(r, word, dot[r]), limit[r].top);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      for (int distance = 16; distance > 0; distance /= 2) {
        sum[r] += __shfl_xor_sync(kAllLanes, sum[r], distance);
      }
      limit[r].limit = numbers.threshold * static_cast<double>(sum[r]);
    }
  }

  // core's sum by halves, as in bitpack.cu: words of the map in the order of their reversed bits.
  __device__ void add_values(AttentionShared& shared, const RowLimit (&limit)[kRowsAtOnce]) const {
    const BinaryAttentionParams& p = view.p;
    const auto* values = static_cast<const float*>(p.value_addend.data) + view.addend.at(batch);
    int levels = 0;
    while ((int64_t{32} << levels) < p.m) ++levels;
    const auto thread = threadIdx.x;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      float sum = 0.0f;
      for (uint32_t i = 0; i < 1u << levels; ++i) {
        const auto word = static_cast<int64_t>(__brev(i) >> 1 >> (31 - levels));
        sum = 0.0f;
        if (word < view.map_words) {
          int32_t dot[kRowsAtOnce];
          dots(word, dot);
          if (active(r, word, dot[r], limit[r])) sum = values[(32 * word + lane) * p.value_addend.row_stride];
        }
        int level = 0;
        for (uint32_t n = i; n & 1u; n >>= 1) sum += shared.partial[level++][thread];
        shared.partial[level][thread] = sum;
      }
      for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
      if (lane == 0) shared.addend[thread / kWarp * kRowsAtOnce + r] = numbers.addend_step * sum;
    }
  }
};

// sum += counts of map & plus, and of map & minus, for the channels of this warp.
template <bool zeros>
__device__ void multiply_chunk(const AttentionView& view, const AttentionShared& shared, int64_t batch, int64_t chunk,
                               int64_t channel, int32_t (&plus)[kFragments][4], int32_t (&minus)[kFragments][4]) {
  const int lane = static_cast<int>(threadIdx.x % kWarp), group = lane / 4, in_group = lane % 4;
  const int64_t left = view.map_words - chunk;
  for (int first = 0; first < kChunkWords && first < left; first += 8) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = shared.map[group + i % 2 * 8][first + in_group + i / 2 * 4];
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
      uint32_t b[2], opposite[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t word = first + in_group + 4 * half;
        const int64_t at = (batch * view.map_words + chunk + word) * view.channels() + channel + 8 * j + group;
        b[half] = word < left ? view.v_plus[at] : 0u;
        opposite[half] = zeros && word < left ? view.v_minus[at] : 0u;
      }
      multiply_bits(plus[j], a, b);
      if constexpr (zeros) multiply_bits(minus[j], a, opposite);
    }
  }
}

template <bool zeros>
__global__ void __launch_bounds__(kThreads) binary_attention_mma_kernel(const __grid_constant__ AttentionView view) {
  auto& shared = shared_memory<AttentionShared>();
  const BinaryAttentionParams& p = view.p;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t blocks_across = view.channels() / kChannels, blocks_down = ceil_div(p.n, kRows);
  const int64_t batch = blockIdx.x / (blocks_across * blocks_down);
  const int64_t first = blockIdx.x / blocks_across % blocks_down * kRows;
  const int64_t channel = blockIdx.x % blocks_across * kChannels;
  const AttentionNumbers numbers =
      view.numbers ? *view.numbers : AttentionNumbers{p.slope, p.threshold, p.step, p.addend_step};
  const Rows<zeros> rows{view, numbers, view.biased && *view.biased, lane, batch, first + warp * kRowsAtOnce};
  RowLimit limit[kRowsAtOnce];
  rows.find_limits(limit);
  if (p.value_addend.data) {
    rows.add_values(shared, limit);
  } else if (lane < kRowsAtOnce) {
    shared.addend[warp * kRowsAtOnce + lane] = 0.0f;
  }

  int32_t plus[kFragments][4] = {}, minus[kFragments][4] = {}, count[kRowsAtOnce] = {};
  for (int64_t chunk = 0; chunk < view.map_words; chunk += kChunkWords) {
    __syncthreads();                                            // the chunk before has been used
    const int64_t used = (view.map_words - chunk + 7) / 8 * 8;  // multiply_chunk takes 8 at a time
    for (int i = 0; i < kChunkWords && i < used; ++i) {
      int32_t dot[kRowsAtOnce] = {};
      const int64_t word = chunk + i;
      if (word < view.map_words) rows.dots(word, dot);
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const bool active = word < view.map_words && rows.active(r, word, dot[r], limit[r]);
        const uint32_t bits = __ballot_sync(kAllLanes, active);
        count[r] += __popc(bits);
        if (lane == 0) shared.map[warp * kRowsAtOnce + r][i] = bits;
      }
    }
    __syncthreads();
    multiply_chunk<zeros>(view, shared, batch, chunk, channel + warp * 8 * kFragments, plus, minus);
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (lane == 0) shared.row_count[warp * kRowsAtOnce + r] = count[r];
  }
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = warp * 8 * kFragments + 8 * j + lane % 4 * 2 + i % 2;
      shared.context[lane / 4 + i / 2 * 8][column] = plus[j][i] - minus[j][i];
    }
  }
  __syncthreads();
  for (int i = thread; i < kRows * kChannels; i += kThreads) {  // a warp has 32 channels of a row
    const int r = i / kChannels;
    const int64_t row = first + r, c = channel + i % kChannels;
    const int32_t counted = shared.context[r][i % kChannels];
    const int32_t whole = zeros ? counted : 2 * counted - shared.row_count[r];
    const bool inside = row < p.n && c < p.e;
    if (!p.bits.heads) {
      const float value = numbers.step * static_cast<float>(whole) + shared.addend[r];
      if (inside) store_as(p.dtype, p.out, view.out.at(batch) + row * p.out_row_stride + c, value);
      continue;
    }
    const int64_t columns = p.bits.heads * p.e, column = batch % p.bits.heads * p.e + c;
    const OutputBits bits = inside ? output_bits(p.bits.out, columns, column, whole) : OutputBits{false, false};
    const uint32_t sign = __ballot_sync(kAllLanes, bits.sign), nonzero = __ballot_sync(kAllLanes, bits.nonzero);
    if (lane == 0 && inside) {
      const int64_t word = ((batch / p.bits.heads * p.n + row) * columns + column) / 32;
      p.bits.out.sign[word] = static_cast<int32_t>(sign);
      if (p.bits.out.nonzero) p.bits.out.nonzero[word] = static_cast<int32_t>(nonzero);
    }
  }
}

Status check(const BinaryAttentionParams& p) {
  for (const int64_t size : {p.batch, p.n, p.m, p.d, p.e}) {
    if (size < 0) return Status::bad_size;
  }
  if (p.d > kMaxColumns || p.m > kMaxColumns) return Status::bad_size;
  if (p.d == 0 || !(p.scale > 0.0f) || !(p.scale < INFINITY)) return Status::bad_argument;
  const AttentionBits& bits = p.bits;
  if (bits.heads < 0 || (bits.heads > 0 && (p.d % 32 || p.e % 32 || p.batch % bits.heads))) {
    return Status::bad_argument;
  }
  return p.mask.count > 0 && p.mask.rows != 1 && p.mask.rows != p.n ? Status::bad_argument : Status::ok;
}

bool one_after_another(const int64_t* first, int64_t sequences, int64_t rows) {
  for (int64_t i = 0; i <= sequences; ++i) {
    if (first[i] != i * rows) return false;
  }
  return true;
}

// Sequences of unequal lengths, one after another.
Status launch_each(const BinaryAttentionParams& p, int32_t* scratch, Stream stream, const AttentionSteps& steps) {
  if (p.mask.count > 0) return Status::bad_argument;
  const AttentionBits& bits = p.bits;
  const auto from = [](AttentionRows rows, int64_t first) {
    rows.sign += first * rows.stride;
    if (rows.nonzero) rows.nonzero += first * rows.stride;
    return rows;
  };
  for (int64_t i = 0; i < p.batch / bits.heads; ++i) {
    const int64_t q_first = bits.q_first[i], k_first = bits.k_first[i];
    const int64_t q_rows[2] = {0, bits.q_first[i + 1] - q_first}, k_rows[2] = {0, bits.k_first[i + 1] - k_first};
    const int64_t words = bits.heads * p.e / 32;
    BinaryAttentionParams one = p;
    one.batch = bits.heads;
    one.n = q_rows[1];
    one.m = k_rows[1];
    one.bits.q = from(bits.q, q_first);
    one.bits.k = from(bits.k, k_first);
    one.bits.v = from(bits.v, k_first);
    one.bits.q_first = q_rows;
    one.bits.k_first = k_rows;
    one.bits.out.sign += q_first * words;
    if (bits.out.nonzero) one.bits.out.nonzero += q_first * words;
    if (const Status status = launch_binary_attention(one, scratch, stream, steps); status != Status::ok) return status;
  }
  return Status::ok;
}

}  // namespace

Status launch_binary_attention(const BinaryAttentionParams& p, int32_t* scratch, Stream stream,
                               const AttentionSteps& steps) {
  if (p.batch == 0 || p.n == 0 || p.e == 0) {
    BinaryAttentionParams empty = p;
    empty.mask.count = 0;
    return check(empty);
  }
  if (const Status status = check(p); status != Status::ok) return status;
  const int64_t sequences = p.bits.heads ? p.batch / p.bits.heads : 0;
  if (p.bits.heads &&
      (!one_after_another(p.bits.q_first, sequences, p.n) || !one_after_another(p.bits.k_first, sequences, p.m))) {
    return launch_each(p, scratch, stream, steps);
  }
  AttentionView view{};
  if (const Status status = pack_attention(p, steps, scratch, stream, view); status != Status::ok) return status;
  const int64_t blocks = p.batch * ceil_div(p.n, kRows) * (view.channels() / kChannels);
  return launch(stream, view.zeros ? binary_attention_mma_kernel<true> : binary_attention_mma_kernel<false>, blocks,
                kThreads, sizeof(AttentionShared), view);
}

}  // namespace bitmill::cuda

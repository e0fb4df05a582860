// SPDX-License-Identifier: Apache-2.0
// The partially binarised product for few rows of activations: the sign plane by the kernel of floats times bits, then
// the salient weights, which are gathered. A block has a tile of 16 outputs; 16 threads share an output, each with a
// stretch of its columns. Where a stretch begins in the values is known once all have counted theirs.
#include "binary_matmul.h"
#include "binary_output.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "salient_scatter.h"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlots = kThreads / kTileRows;

template <int rows>
struct SalientShared {
  int64_t count[kSlots][kTileRows];
  float sum[kSlots][rows][kTileRows];
};

__device__ float salient_value(const SalientWeight& w, int64_t row, int64_t i) {
  if (!w.value_scale) return widen(static_cast<const Float16*>(w.value)[i]);
  const auto* codes = static_cast<const uint8_t*>(w.value);
  const int code = w.code_bits == 4 ? codes[i / 2] >> (i % 2 * 4) & 15 : codes[i];
  return w.value_scale[row] * (static_cast<float>(code) - w.value_zero[row]);
}

__device__ uint32_t mask_word(const SalientWeight& w, int64_t tile, int lane, int64_t word) {
  const int64_t left = w.k - 32 * word;
  const uint32_t columns = left >= 32 ? ~0u : (1u << left) - 1;
  return static_cast<uint32_t>(w.mask[(tile * word_count(w.k) + word) * kTileRows + lane]) & columns;
}

// Calls each(column, index of its value) for a slot's share of the salient weights of an output. Whatever the arrays
// hold, columns are those of the weight and indices lie among the values. All threads of the block come along.
template <class Shared, class Each>
__device__ void walk(const SalientWeight& w, Shared& shared, int64_t tile, int lane, int slot, const Each& each) {
  const int64_t row = tile * kTileRows + lane;
  const bool inside = row < w.n;
  const auto share = [&](int64_t count, int of) { return of * ceil_div(count, int64_t{kSlots}); };
  const auto before = [&](int64_t own) {  // what the slots in front of this one have counted
    shared.count[slot][lane] = own;
    __syncthreads();
    int64_t sum = 0;
    for (int s = 0; s < slot; ++s) sum += shared.count[s][lane];
    return sum;
  };
  if (w.encoding == SalientEncoding::bitmap) {
    const int64_t words = word_count(w.k), first = share(words, slot);
    const int64_t last = inside ? (first + share(words, 1) < words ? first + share(words, 1) : words) : first;
    int64_t own = 0;
    for (int64_t word = first; word < last; ++word) own += __popc(mask_word(w, tile, lane, word));
    int64_t entry = before(own) + (inside ? w.start[row] : 0);
    const int64_t end = inside ? (w.start[row + 1] < w.entries ? w.start[row + 1] : w.entries) : 0;
    for (int64_t word = first; word < last; ++word) {
      for (uint32_t bits = mask_word(w, tile, lane, word); bits && entry >= 0 && entry < end; bits &= bits - 1) {
        each(32 * word + __popc((bits & -bits) - 1), entry++);
      }
    }
  } else if (w.encoding == SalientEncoding::list) {
    const int64_t begin = w.start[tile] > 0 ? w.start[tile] : 0;
    const int64_t end = w.start[tile + 1] < w.entries ? w.start[tile + 1] : w.entries;
    const int64_t first = begin + share(end - begin, slot);
    const int64_t last = first + share(end - begin, 1) < end ? first + share(end - begin, 1) : end;
    const auto distance = [](uint8_t gap) { return gap == kNoEntry ? int64_t{kNoEntry} : int64_t{gap} + 1; };
    int64_t own = 0;
    for (int64_t step = first; step < last; ++step) own += distance(w.gap[step * kTileRows + lane]);
    int64_t column = before(own) - 1;
    for (int64_t step = first; step < last; ++step) {
      const uint8_t gap = w.gap[step * kTileRows + lane];
      column += distance(gap);
      if (inside && gap != kNoEntry && column < w.k) each(column, step * kTileRows + lane);
    }
  } else {
    const auto in_word = static_cast<unsigned>(w.value_scale ? 32 / w.code_bits : 2);
    const int64_t value_words = ceil_div(w.entries, in_word);
    const int64_t first = share(w.entries, slot);
    const int64_t last = first + share(w.entries, 1) < w.entries ? first + share(w.entries, 1) : w.entries;
    for (int64_t j = first; inside && j < last; ++j) {
      const auto number = static_cast<unsigned>(j);
      const int64_t word = (tile * value_words + number / in_word) * kTileRows + lane, column = w.column[j];
      if (column >= 0 && column < w.k) each(column, word * in_word + number % in_word);
    }
  }
}

// totals[m, groups]: the sums of x over the columns of each group, a warp each.
template <class T>
__global__ void __launch_bounds__(kThreads) group_totals_kernel(SalientMatmulParams p, int64_t groups, float* totals) {
  const int64_t i = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (i >= p.m * groups) return;  // a whole warp
  const int64_t k = p.weight.k, width = p.weight.group_size > 0 ? p.weight.group_size : k;
  const int64_t first = i % groups * width, last = first + width < k ? first + width : k;
  const T* x = static_cast<const T*>(p.x) + i / groups * k;
  float sum = 0.0f;
  for (int64_t column = first + threadIdx.x % kWarp; column < last; column += kWarp) sum += widen(x[column]);
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (threadIdx.x % kWarp == 0) totals[i] = sum;
}

template <class T, int rows>
__global__ void __launch_bounds__(kThreads)
    salient_matmul_kernel(SalientMatmulParams p, int64_t groups, const float* signs, const float* totals) {
  auto& shared = shared_memory<SalientShared<rows>>();
  const SalientWeight& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kTileRows, slot = thread / kTileRows;
  const auto tiles = static_cast<unsigned>(tile_count(w.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * rows;
  const int64_t output = tile * kTileRows + lane;
  const auto width = static_cast<unsigned>(w.group_size > 0 ? w.group_size : w.k);
  const T* x = static_cast<const T*>(p.x) + first_row * w.k;
  float sum[rows] = {};
  walk(w, shared, tile, lane, slot, [&](int64_t column, int64_t i) {
    const int64_t group = output * groups + static_cast<unsigned>(column) / width;
    const float mean = w.mu ? w.mu[group] : 0.0f;
    const float more = salient_value(w, output, i) - (mean - w.alpha[group]);  // than the sign plane has given
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      if (first_row + r < p.m) sum[r] = fmaf(widen(x[r * w.k + column]), more, sum[r]);
    }
  });
#pragma unroll
  for (int r = 0; r < rows; ++r) shared.sum[slot][r][lane] = sum[r];
  __syncthreads();
  const int64_t row = first_row + slot;
  if (slot >= rows || row >= p.m || output >= w.n) return;
  float value = 0.0f;
  for (int s = 0; s < kSlots; ++s) value += shared.sum[s][slot][lane];
  for (int64_t group = 0; w.mu && group < groups; ++group) {
    value = fmaf(w.mu[output * groups + group], totals[row * groups + group], value);
  }
  value += signs[row * w.n + output];
  store_as(p.dtype, p.out, row * w.n + output, p.bias ? value + p.bias[output] : value);
}

template <class T, int rows>
Status start(const SalientMatmulParams& p, int64_t groups, const float* signs, const float* totals, Stream stream) {
  const int64_t blocks = tile_count(p.weight.n) * ceil_div(p.m, rows);
  return launch(stream, salient_matmul_kernel<T, rows>, blocks, kThreads, sizeof(SalientShared<rows>), p, groups, signs,
                totals);
}

Status check(const SalientMatmulParams& p) {
  const SalientWeight& w = p.weight;
  if (p.m < 0 || w.n < 0 || w.k < 0 || w.entries < 0 || w.k > kMaxColumns) return Status::bad_size;
  if (w.group_size < 0 || w.group_size % 32 != 0 || p.int8) return Status::bad_argument;
  if ((w.value_scale == nullptr) != (w.value_zero == nullptr)) return Status::bad_argument;
  if (w.code_bits != 8 && w.code_bits != 4) return Status::bad_argument;
  if (w.encoding == SalientEncoding::columns && w.entries > w.k) return Status::corrupt;
  const bool list = w.encoding == SalientEncoding::list;
  return list && w.k > bitmill::detail::kMaxListColumns ? Status::bad_argument : Status::ok;
}

}  // namespace

Status launch_salient_matmul(const SalientMatmulParams& p, float* signs, float* totals, Stream stream) {
  const SalientWeight& w = p.weight;
  if (const Status status = check(p); status != Status::ok || p.m == 0 || w.n == 0) return status;
  const int64_t groups = w.group_size > 0 ? ceil_div(w.k, w.group_size) : 1;
  BinaryWeightMatmulParams plane;
  plane.x = p.x;
  plane.dtype = p.dtype;
  plane.weight = w.sign;
  plane.m = p.m;
  plane.n = w.n;
  plane.k = w.k;
  plane.scale = w.alpha;
  plane.group_size = w.group_size;
  plane.out = signs;
  if (const Status status = launch_binary_weight_matmul(plane, stream, Dtype::f32); status != Status::ok) return status;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    if (w.mu && groups > 0) {
      const int64_t blocks = ceil_div(p.m * groups, int64_t{kThreads / kWarp});
      const Status status = launch(stream, group_totals_kernel<T>, blocks, kThreads, 0, p, groups, totals);
      if (status != Status::ok) return status;
    }
    return p.m == 1 ? start<T, 1>(p, groups, signs, totals, stream) : start<T, 4>(p, groups, signs, totals, stream);
  });
}

}  // namespace bitmill::cuda

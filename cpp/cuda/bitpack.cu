// SPDX-License-Identifier: Apache-2.0
// Packing rows: a thread reads 8 neighbouring values at once and writes their bits as one byte, so that a warp's reads
// and writes are whole sectors. A short row belongs to a warp, a long one to a block.
#include "bitpack.h"
#include "device.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShortRow = 2048;

// Levels of the sum below: log2 of the most columns a thread has, and one more.
template <int width>
constexpr int kLevels = width == 32 ? 7 : 17;

template <int width>
struct BitpackShared {
  int32_t count[kThreads / kWarp];
  float sum[kThreads];
  float partial[kLevels<width>][kThreads];
};

// mean_by_halves of core/bitpack.h with the same additions. Thread t of a row's `width` threads has the columns t, t +
// width, ...: they are added by halves too, which visits them in the order of their reversed bits and adds neighbours.
template <class T, int width>
__device__ void write_mean(const BitpackParams& p, BitpackShared<width>& shared, int64_t row, int t) {
  int levels = 0;
  while ((int64_t{width} << levels) < p.k) ++levels;
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride;
  float sum = 0.0f;
  for (uint32_t i = 0; i < 1u << levels; ++i) {
    const int64_t column = t + width * static_cast<int64_t>(__brev(i) >> 1 >> (31 - levels));
    sum = 0.0f;
    if (column < p.k) {
      sum = widen(x[column]);
      if (p.shift) sum += p.shift[column];
      sum = fabsf(sum);
    }
    int level = 0;
    for (uint32_t n = i; n & 1u; n >>= 1) sum += shared.partial[level++][threadIdx.x];
    shared.partial[level][threadIdx.x] = sum;
  }
  if constexpr (width > 32) {
    shared.sum[threadIdx.x] = sum;
    for (int half = width / 2; half >= 32; half /= 2) {
      __syncthreads();
      if (t < half) shared.sum[t] = sum = sum + shared.sum[t + half];
    }
  }
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(kAllLanes, sum, half);
  if (t == 0) p.mean[row] = p.k > 0 ? sum / static_cast<float>(p.k) : 0.0f;
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads) bitpack_kernel(BitpackParams p, const float* alpha, bool aligned) {
  auto& shared = shared_memory<BitpackShared<width>>();
  const int t = static_cast<int>(threadIdx.x) % width;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / width) + threadIdx.x / width;
  if (row >= p.m) return;  // a whole warp, of a kernel without barriers of the block
  const T* x = static_cast<const T*>(p.x) + row * p.row_stride;
  const int64_t bytes = 4 * word_count(p.k);
  auto* sign = reinterpret_cast<uint8_t*>(p.sign) + row * bytes;
  auto* nonzero = p.nonzero ? reinterpret_cast<uint8_t*>(p.nonzero) + row * bytes : nullptr;
  const bool plus = p.levels == Levels::plus, ternary = p.levels == Levels::sign;
  const float threshold = ternary ? 0.0f : alpha ? *alpha / 2 : p.threshold;
  int32_t count = 0;
  for (int64_t i = t; i < bytes; i += width) {
    const int64_t first = 8 * i, left = p.k - first;
    float z[8];
    load8(x + first, left, aligned, z);
    if (p.shift) {
#pragma unroll
      for (int j = 0; j < 8; ++j) z[j] += j < left ? p.shift[first + j] : 0.0f;
    }
    uint32_t bits = 0, present = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      bits |= static_cast<uint32_t>(plus ? z[j] >= 0 : z[j] > threshold) << j;
      present |= static_cast<uint32_t>(z[j] > 0 || z[j] < 0) << j;
    }
    const uint32_t columns = left >= 8 ? 0xFFu : left > 0 ? (1u << left) - 1 : 0u;
    bits &= columns;
    present &= columns;
    sign[i] = static_cast<uint8_t>(bits);
    if (nonzero) nonzero[i] = static_cast<uint8_t>(present);
    count += __popc(ternary ? present : bits);
  }
  if (p.count) {
    for (int lanes = 16; lanes > 0; lanes /= 2) count += __shfl_xor_sync(kAllLanes, count, lanes);
    if constexpr (width > 32) {
      if (t % 32 == 0) shared.count[t / 32] = count;
      __syncthreads();
      count = 0;
      for (int warp = 0; warp < width / 32; ++warp) count += shared.count[warp];
    }
    if (t == 0) p.count[row] = count;
  }
  if (p.mean) write_mean<T, width>(p, shared, row, t);
}

template <class T, int width>
Status start(const BitpackParams& p, Stream stream, const float* alpha) {
  const bool aligned = aligned16(p.x) && p.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return launch(stream, bitpack_kernel<T, width>, ceil_div(p.m, kThreads / width), kThreads,
                sizeof(BitpackShared<width>), p, alpha, aligned);
}

}  // namespace

Status launch_bitpack(const BitpackParams& p, Stream stream, const float* alpha) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.m > 0 && p.k > 0 && (p.levels == Levels::sign) != (p.nonzero != nullptr)) return Status::bad_argument;
  if (p.m == 0) return Status::ok;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    return p.k <= kShortRow ? start<T, 32>(p, stream, alpha) : start<T, kThreads>(p, stream, alpha);
  });
}

}  // namespace bitmill::cuda

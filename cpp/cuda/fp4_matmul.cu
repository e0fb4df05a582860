// SPDX-License-Identifier: Apache-2.0
// Floats times 4-bit codes: for few rows of activations, where the weight is read once and every code is looked up. The
// table of 16 values stands in shared memory, where no two of them meet in a bank, and serves every format and codebook
// alike.
#include "binary_output.cuh"
#include "device.cuh"
#include "fp4_matmul.h"
#include "launch.cuh"
#include "rows.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlots = kThreads / 4;  // 4 threads read a word of 16 outputs as 64 bytes

template <int rows>
struct Fp4Shared {
  float table[16];
  float sum[kSlots][rows][kTileRows];
};

// A tile of 16 outputs and `rows` rows a block; slots take words slot, slot + kSlots, ... of 8 columns.
template <class T, int rows>
__global__ void __launch_bounds__(kThreads)
    fp4_matmul_kernel(Fp4MatmulParams p, const __grid_constant__ Fp4Table table, bool aligned) {
  auto& shared = shared_memory<Fp4Shared<rows>>();
  const Fp4Weight& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x), quad = thread % 4, slot = thread / 4;
  const auto tiles = static_cast<unsigned>(tile_count(w.n));
  const int64_t tile = blockIdx.x % tiles, first_row = int64_t{blockIdx.x / tiles} * rows;
  const int64_t words = word_count(w.k, 4);
  const auto group_words = static_cast<unsigned>(w.group_size > 0 ? w.group_size / 8 : words);
  const int64_t groups = w.group_size > 0 ? ceil_div(w.k, w.group_size) : 1;
  if (thread < 16) shared.table[thread] = w.table ? w.table[thread] : table.value[thread];
  __syncthreads();

  float sum[rows][4] = {};
  for (int64_t word = slot; word < words; word += kSlots) {
    const uint4 codes4 = *reinterpret_cast<const uint4*>(w.tiles + (tile * words + word) * kTileRows + 4 * quad);
    const uint32_t codes[4] = {codes4.x, codes4.y, codes4.z, codes4.w};
    float x[rows][8];
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const bool inside = first_row + r < p.m;
      const T* from = static_cast<const T*>(p.x) + (inside ? (first_row + r) * w.k + 8 * word : 0);
      load8(from, inside ? w.k - 8 * word : 0, aligned, x[r]);
    }
    const int64_t group = static_cast<unsigned>(word) / group_words;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t output = tile * kTileRows + 4 * quad + i;
      const float scale = output < w.n ? weight_scale(w, output * groups + group) : 0.0f;
      float part[rows] = {};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float value = shared.table[codes[i] >> 4 * j & 15u];
#pragma unroll
        for (int r = 0; r < rows; ++r) part[r] = fmaf(value, x[r][j], part[r]);
      }
#pragma unroll
      for (int r = 0; r < rows; ++r) sum[r][i] = fmaf(scale, part[r], sum[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.sum[slot][r][4 * quad + i] = sum[r][i];
  }
  __syncthreads();
  if (thread >= rows * kTileRows) return;
  const int r = thread / kTileRows;
  const int64_t row = first_row + r, output = tile * kTileRows + thread % kTileRows;
  if (row >= p.m || output >= w.n) return;
  float value = 0.0f;
  for (int s = 0; s < kSlots; ++s) value += shared.sum[s][r][thread % kTileRows];
  store_as(p.dtype, p.out, row * w.n + output, p.bias ? value + p.bias[output] : value);
}

template <class T, int rows>
Status start(const Fp4MatmulParams& p, const Fp4Table& table, Stream stream) {
  const int64_t blocks = tile_count(p.weight.n) * ceil_div(p.m, rows);
  const bool aligned = aligned16(p.x) && p.weight.k * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return launch(stream, fp4_matmul_kernel<T, rows>, blocks, kThreads, sizeof(Fp4Shared<rows>), p, table, aligned);
}

}  // namespace

Status launch_fp4_matmul(const Fp4MatmulParams& p, const Fp4Table* table, Stream stream) {
  const Fp4Weight& w = p.weight;
  if (p.m < 0 || w.n < 0 || w.k < 0 || w.k > kMaxColumns) return Status::bad_size;
  const bool one_table = (w.table != nullptr) != (table != nullptr);
  const bool one_scale = (w.scale != nullptr) != (w.scale_bytes != nullptr) || w.n == 0 || w.k == 0;
  if (!one_table || !one_scale || (w.global_scale && w.scale) || p.row_scale) return Status::bad_argument;
  if (w.group_size < 0 || w.group_size % 8 != 0 || !aligned16(w.tiles)) return Status::bad_argument;
  if (p.m == 0 || w.n == 0) return Status::ok;
  return with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const Fp4Table values = table ? *table : Fp4Table{};
    return p.m == 1 ? start<T, 1>(p, values, stream) : start<T, 4>(p, values, stream);
  });
}

}  // namespace bitmill::cuda

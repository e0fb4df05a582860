// SPDX-License-Identifier: Apache-2.0
// What the kernels of products of bits on the tensor cores share.
#pragma once

#include "binary_output.cuh"
#include "launchers.h"

namespace bitmill::cuda {

// For checked params with m, n > 0, no groups and no zeros in the weight, on compute capability 8 or 9.
Status launch_binary_matmul_mma(const BinaryMatmulParams& params, Stream stream);

#ifdef BITMILL_WGMMA
// For the same on compute capability 9, large enough to fill the GPU, without zeros in the rows; not every alignment.
bool multiplies_wgmma(const BinaryMatmulParams& params);
Status launch_binary_matmul_wgmma(const BinaryMatmulParams& params, Stream stream);
#endif

// Stores a block of outputs from the counts of s & w, and of the bits of rows (ternary: of nonzero bits) and of columns
// (of Operand::sign). All threads of the block come along.
template <Operand operand, int threads, int rows, int columns, int padded>
__device__ void store_counts(const BinaryMatmulParams& p, int64_t first_row, int64_t first_column,
                             const int32_t (&sum)[rows][padded], const int32_t (&row_count)[rows],
                             const int32_t (&column_count)[columns]) {
  const int32_t k = static_cast<int32_t>(p.k);
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += threads) {  // a warp has 32 columns of a row
    const int r = i / columns, c = i % columns;
    const int64_t row = first_row + r, column = first_column + c;
    const int32_t count = sum[r][c], of_row = row_count[r];
    const int32_t dot = operand == Operand::sign ? k - 2 * (of_row + column_count[c]) + 4 * count : 2 * count - of_row;
    const bool inside = row < p.m && column < p.n;
    if (!p.bits.sign) {
      if (inside) store_dot(p, row, column, dot);
      continue;
    }
    const OutputBits bits = inside ? output_bits(p.bits, p.n, column, dot) : OutputBits{false, false};
    const uint32_t sign = __ballot_sync(kAllLanes, bits.sign), nonzero = __ballot_sync(kAllLanes, bits.nonzero);
    if (threadIdx.x % kWarp == 0 && inside) {
      const int64_t word = row * word_count(p.n) + column / 32;
      p.bits.sign[word] = static_cast<int32_t>(sign);
      if (p.bits.nonzero) p.bits.nonzero[word] = static_cast<int32_t>(nonzero);
    }
  }
}

}  // namespace bitmill::cuda

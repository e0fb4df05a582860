// SPDX-License-Identifier: Apache-2.0
// What the AVX-512 forms of the salient part with int8 activations share.
#pragma once

#include "salient_scatter_avx512.h"

namespace bitmill::detail {

struct SalientInt8Rows {
  const SalientTask& task;
  int64_t width;    // of a row that is multiplied: k, or the number of salient columns to a multiple of 4
  const int8_t* q;  // [m, width]
};

// All rows, transposed; for few rows other forms are faster. salient_tiles_avx512vnni chooses.
void salient_many_rows_avx512vnni(const SalientInt8Rows& rows, int64_t begin, int64_t end, TileFactors factors);

}  // namespace bitmill::detail

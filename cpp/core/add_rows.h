// SPDX-License-Identifier: Apache-2.0
// Rows of a float table added to rows in place, as a sum of embeddings asks for.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "status.h"

namespace bitmill {

struct AddRowsParams {
  float* x = nullptr;  // [m, k]
  int64_t m = 0, k = 0;
  const float* table = nullptr;  // [rows, k]
  int64_t rows = 0;
  const int64_t* ids = nullptr;  // [m], each in [0, rows); null: first, first + 1, ... and, past the last, 0 again
  int64_t first = 0;
  ParallelFor parallel_for = serial_for;
};
Status add_rows(const AddRowsParams& params);  // bad_size for an id outside
AddRowsParams rows_of(AddRowsParams params, int64_t begin, int64_t end);
double nanoseconds_per_row(const AddRowsParams& params);

}  // namespace bitmill

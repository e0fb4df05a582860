// SPDX-License-Identifier: Apache-2.0
#include "add_rows.h"

#include <algorithm>

namespace bitmill {

Status add_rows(const AddRowsParams& p) {
  const auto outside = [&](int64_t id) { return id < 0 || id >= p.rows; };
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.m == 0) return Status::ok;
  if (p.ids ? std::any_of(p.ids, p.ids + p.m, outside) : outside(p.first)) return Status::bad_size;
  split(p.parallel_for, p.m, nanoseconds_per_row(p), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = p.table + (p.ids ? p.ids[i] : (p.first + i) % p.rows) * p.k;
      float* x = p.x + i * p.k;
      for (int64_t j = 0; j < p.k; ++j) x[j] += row[j];
    }
  });
  return Status::ok;
}

double nanoseconds_per_row(const AddRowsParams& p) { return static_cast<double>(p.k) * 0.1; }

AddRowsParams rows_of(AddRowsParams p, int64_t begin, int64_t end) {
  p.m = end - begin;
  p.x += begin * p.k;
  if (p.ids) {
    p.ids += begin;
  } else {
    p.first = (p.first + begin) % p.rows;
  }
  return p;
}

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// The checks of an FP4 weight, and its values.
#include "fp4.h"

#include "cpu.h"
#include "layout.h"

namespace bitmill {
Status detail::fp4_weight_check(const Fp4Weight& w) {
  if (w.n < 0 || w.k < 0 || w.k > kMaxColumns) return Status::bad_size;
  if (w.group_size < 0 || w.group_size % values_per_word(4) != 0) return Status::bad_argument;
  const bool empty = w.groups() * w.n == 0;  // and may have no address
  const int scales = (w.scale != nullptr) + (w.scale_bytes != nullptr);
  if (!w.table || scales > 1 || (scales == 0 && !empty)) return Status::bad_argument;
  if (w.global_scale && w.scale) return Status::bad_argument;
  return Status::ok;
}

Status fp4_weight(const Fp4Weight& w, float* values, ParallelFor parallel_for) {
  if (const Status status = detail::fp4_weight_check(w); status != Status::ok) return status;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && w.k > 0) {
    split(parallel_for, tile_count(w.n), static_cast<double>(w.k) * kTileRows * 0.3,
          [&](int64_t begin, int64_t end) { detail::fp4_weight_tiles_avx2(w, values, begin, end); });
    return Status::ok;
  }
#endif
  const int64_t groups = w.groups(), words = word_count(w.k, 4);
  split(parallel_for, w.n, static_cast<double>(w.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* lane = w.tiles + (row / kTileRows) * words * kTileRows + row % kTileRows;
      for (int64_t j = 0; j < w.k; ++j) {
        const uint32_t code = (static_cast<uint32_t>(lane[(j / 8) * kTileRows]) >> (4 * (j % 8))) & 15u;
        const int64_t group = row * groups + j / w.group_width();
        values[row * w.k + j] = w.global_scale ? e4m3_to_float(w.scale_bytes[group]) * w.table[code] * *w.global_scale
                                               : weight_scale(w, group) * w.table[code];
      }
    }
  });
  return Status::ok;
}

}  // namespace bitmill

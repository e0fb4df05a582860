// SPDX-License-Identifier: Apache-2.0
// The obvious product with an FP4 weight, and the choice of a faster one.
#include "fp4.h"

#include <algorithm>
#include <bit>

#include "cpu.h"
#include "layout.h"
#include "panel_matmul.h"

namespace bitmill {
namespace detail {
namespace {

bool valid_size(int64_t m, int64_t k) { return m >= 0 && k >= 0 && k <= kMaxColumns; }

// Values without their scale, columns [begin, end) of the tile's 16 rows, to panel [end - begin][16].
void decode_tile(const Fp4Weight& w, int64_t tile, int64_t begin, int64_t end, float* panel) {
  const int64_t words = word_count(w.k, 4), values = values_per_word(4);
  for (int64_t j = begin; j < end; ++j) {
    const int32_t* lanes = w.tiles + (tile * words + j / values) * kTileRows;
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      const uint32_t code = (static_cast<uint32_t>(lanes[lane]) >> (4 * (j % values))) & 15u;
      panel[(j - begin) * kTileRows + lane] = w.table[code];
    }
  }
}

Status check(const Fp4Weight& w) {
  if (w.n < 0 || !valid_size(0, w.k)) return Status::bad_size;
  if (w.group_size < 0 || w.group_size % values_per_word(4) != 0) return Status::bad_argument;
  const bool empty = PanelShape{0, w.n, w.k, w.group_size}.groups() * w.n == 0;  // and may have no address
  const int scales = (w.scale != nullptr) + (w.scale_bytes != nullptr);
  if (!w.table || scales > 1 || (scales == 0 && !empty)) return Status::bad_argument;
  if (w.global_scale && w.scale) return Status::bad_argument;
  return Status::ok;
}

}  // namespace

}  // namespace detail

Status fp4_weight(const Fp4Weight& w, float* values, ParallelFor parallel_for) {
  if (const Status status = detail::check(w); status != Status::ok) return status;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && w.k > 0) {
    split(parallel_for, tile_count(w.n), static_cast<double>(w.k) * kTileRows * 0.3,
          [&](int64_t begin, int64_t end) { detail::fp4_weight_tiles_avx2(w, values, begin, end); });
    return Status::ok;
  }
#endif
  const detail::PanelShape shape{0, w.n, w.k, w.group_size};
  const int64_t groups = shape.groups(), words = word_count(w.k, 4);
  split(parallel_for, w.n, static_cast<double>(w.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* lane = w.tiles + (row / kTileRows) * words * kTileRows + row % kTileRows;
      for (int64_t j = 0; j < w.k; ++j) {
        const uint32_t code = (static_cast<uint32_t>(lane[(j / 8) * kTileRows]) >> (4 * (j % 8))) & 15u;
        const int64_t group = row * groups + j / shape.group_width();
        values[row * w.k + j] = w.global_scale ? e4m3_to_float(w.scale_bytes[group]) * w.table[code] * *w.global_scale
                                               : weight_scale(w, group) * w.table[code];
      }
    }
  });
  return Status::ok;
}

#ifdef BITMILL_AVX512
// bfloat16 activations times 16 values that bfloat16 holds exactly, on a machine that multiplies them.
static bool multiplies_in_bfloat16(const Fp4MatmulParams& p) {
  const float* table = p.weight.table;
  return p.dtype == Dtype::bf16 && has_bf16_dot() &&
         std::all_of(table, table + 16, [](float value) { return (std::bit_cast<uint32_t>(value) & 0xFFFFu) == 0; });
}
#endif

static Status int8_matmul(const Fp4MatmulParams& p) {
  const Fp4Weight& w = p.weight;
  const int64_t width = w.group_size > 0 ? std::min(w.group_size, w.k) : w.k;
  Fp4Integers integers;
  if (!fp4_integers(w.table, integers) || width > fp4_int8_columns(integers)) return Status::bad_argument;
  auto* tiles = detail::fp4_int8_matmul_tiles_generic;
  double nanoseconds = 0.1;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && p.m > 0 && w.k > 0) {
    tiles = detail::fp4_int8_matmul_tiles_avx2;
    nanoseconds = 0.008;
  }
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && has_int8_dot() && p.m > 0 && w.k > 0) {
    tiles = detail::fp4_int8_matmul_tiles_avx512vnni;
    nanoseconds = 0.006;
  }
#endif
  nanoseconds *= static_cast<double>(p.m + 2) * static_cast<double>(w.k) * kTileRows;
  split(p.parallel_for, tile_count(w.n), nanoseconds,
        [&](int64_t begin, int64_t end) { tiles(p, integers, begin, end); });
  return Status::ok;
}

Status fp4_matmul(const Fp4MatmulParams& p) {
  if (p.m < 0) return Status::bad_size;
  if (const Status status = detail::check(p.weight); status != Status::ok) return status;
  if (p.row_scale) return int8_matmul(p);
  const Fp4Weight& w = p.weight;
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && p.m > 0 && w.k > 0) {
    const double nanoseconds = static_cast<double>(p.m + 2) * static_cast<double>(w.k) * kTileRows * 0.02;
    auto* tiles = multiplies_in_bfloat16(p) ? detail::fp4_matmul_tiles_avx512bf16 : detail::fp4_matmul_tiles_avx512;
    split(p.parallel_for, tile_count(w.n), nanoseconds, [&](int64_t begin, int64_t end) { tiles(p, begin, end); });
    return Status::ok;
  }
#endif
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && p.m > 0 && w.k > 0) {
    const double nanoseconds = static_cast<double>(p.m + 2) * static_cast<double>(w.k) * kTileRows * 0.03;
    split(p.parallel_for, tile_count(w.n), nanoseconds,
          [&](int64_t begin, int64_t end) { detail::fp4_matmul_tiles_avx2(p, begin, end); });
    return Status::ok;
  }
#endif
  const detail::PanelShape shape{p.m, w.n, w.k, w.group_size};
  const int64_t groups = shape.groups();
  const auto decode = [&](int64_t tile, int64_t begin, int64_t end, float* panel) {
    detail::decode_tile(w, tile, begin, end, panel);
  };
  const auto finish = [&](int64_t, int64_t tile, int64_t lane, int64_t group, float sum, float& value) {
    value += weight_scale(w, (tile * kTileRows + lane) * groups + group) * sum;
  };
  const auto done = [&](int64_t, int64_t tile, int64_t lane, float value) {
    return p.bias ? value + p.bias[tile * kTileRows + lane] : value;
  };
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    detail::panel_matmul(shape, static_cast<const T*>(p.x), out, p.parallel_for, decode, finish, done);
  });
  return Status::ok;
}

}  // namespace bitmill

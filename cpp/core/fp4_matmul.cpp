// SPDX-License-Identifier: Apache-2.0
// The obvious product of floats with an FP4 weight, and the choice of a faster one.
#include "fp4_matmul.h"

#include <algorithm>
#include <bit>

#include "cpu.h"
#include "layout.h"
#include "panel_matmul.h"
#include "rounded_rows.h"

namespace bitmill {
namespace detail {

void fp4_matmul_tiles_generic(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  const Fp4Weight& w = p.weight;
  const PanelShape shape{p.m, w.n, w.k, w.group_size};
  const int64_t groups = w.groups(), words = word_count(w.k, 4), values = values_per_word(4);
  const auto decode = [&](int64_t tile, int64_t first, int64_t last, float* panel) {  // without the scale
    for (int64_t j = first; j < last; ++j) {
      const int32_t* lanes = w.tiles + (tile * words + j / values) * kTileRows;
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const uint32_t code = (static_cast<uint32_t>(lanes[lane]) >> (4 * (j % values))) & 15u;
        panel[(j - first) * kTileRows + lane] = w.table[code];
      }
    }
  };
  const auto finish = [&](int64_t, int64_t tile, int64_t lane, int64_t group, float sum, float& value) {
    value += weight_scale(w, (tile * kTileRows + lane) * groups + group) * sum;
  };
  const auto done = [&](int64_t, int64_t tile, int64_t lane, float value) {
    return p.bias ? value + p.bias[tile * kTileRows + lane] : value;
  };
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    panel_tiles(shape, static_cast<const T*>(p.x), out, begin, end, decode, finish, done);
  });
}

}  // namespace detail

namespace {

// One of the two, and how long a column of an output takes, roughly.
struct Kernel {
  void (*floats)(const Fp4MatmulParams&, int64_t, int64_t) = nullptr;
  void (*int8)(const Fp4MatmulParams&, const Fp4Integers&, int64_t, int64_t) = nullptr;
  double nanoseconds;
  Fp4Integers integers = {};

  void operator()(const Fp4MatmulParams& p, int64_t begin, int64_t end) const {
    int8 ? int8(p, integers, begin, end) : floats(p, begin, end);
  }
};

#ifdef BITMILL_AVX512
// bfloat16 activations times 16 values that bfloat16 holds exactly, on a machine that multiplies them.
bool multiplies_in_bfloat16(const Fp4MatmulParams& p) {
  const float* table = p.weight.table;
  return p.dtype == Dtype::bf16 && has_bf16_dot() &&
         std::all_of(table, table + 16, [](float value) { return (std::bit_cast<uint32_t>(value) & 0xFFFFu) == 0; });
}
#endif

Kernel choose_kernel([[maybe_unused]] const Fp4MatmulParams& p, bool int8) {
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && p.m > 0 && p.weight.k > 0) {
    if (int8 && has_int8_dot()) return {nullptr, detail::fp4_int8_matmul_tiles_avx512vnni, 0.006};
    if (!int8 && multiplies_in_bfloat16(p)) return {detail::fp4_matmul_tiles_avx512bf16, nullptr, 0.01};
    if (!int8) return {detail::fp4_matmul_tiles_avx512, nullptr, 0.02};
  }
#endif
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes() && p.m > 0 && p.weight.k > 0) {
    if (int8) return {nullptr, detail::fp4_int8_matmul_tiles_avx2, 0.008};
    return {detail::fp4_matmul_tiles_avx2, nullptr, 0.03};
  }
#endif
  if (int8) return {nullptr, detail::fp4_int8_matmul_tiles_generic, 0.1};
  return {detail::fp4_matmul_tiles_generic, nullptr, 0.3};
}

Status prepare(const Fp4MatmulParams& p, bool int8, Kernel& kernel) {
  if (p.m < 0) return Status::bad_size;
  const Fp4Weight& w = p.weight;
  if (const Status status = detail::fp4_weight_check(w); status != Status::ok) return status;
  kernel = choose_kernel(p, int8);
  if (!int8) return Status::ok;
  const int64_t width = w.group_size > 0 ? std::min(w.group_size, w.k) : w.k;
  const bool fits = fp4_integers(w.table, kernel.integers) && width <= fp4_int8_columns(kernel.integers);
  return fits ? Status::ok : Status::bad_argument;
}

int64_t row_scales(const Fp4MatmulParams& p) { return p.grouped_rows ? p.weight.groups() : 1; }

// `count` rows of a product, from `row` on.
Fp4MatmulParams rows_of(Fp4MatmulParams p, int64_t row, int64_t count) {
  const int64_t size = p.row_scale ? 1 : bytes_of(p.dtype);
  if (p.x) p.x = static_cast<const char*>(p.x) + row * p.weight.k * size;
  if (p.row_scale) p.row_scale += row * row_scales(p);
  p.m = count;
  p.out = static_cast<char*>(p.out) + row * p.weight.n * bytes_of(p.dtype);
  return p;
}

// What a row of a tile costs: decoding the weight takes as long as two rows.
double cost_of(const Fp4MatmulParams& p, const Kernel& kernel) {
  return kernel.nanoseconds * static_cast<double>(p.weight.k * kTileRows) * static_cast<double>(p.m + 2) /
         static_cast<double>(std::max<int64_t>(p.m, 1));
}

template <class Round>
Status linear(const Fp4MatmulParams& p, const Round& round) {
  Kernel kernel;
  if (const Status status = prepare(p, true, kernel); status != Status::ok) return status;
  const detail::RoundedRows rows{p.m, p.weight.n, p.weight.k, row_scales(p), cost_of(p, kernel), kManyRows};
  detail::multiply_rounded(
      rows, p.parallel_for, round,
      [&](int64_t row, int64_t count, const int8_t* q, const float* scale, int64_t begin, int64_t end) {
        Fp4MatmulParams part = rows_of(p, row, count);
        part.x = q, part.row_scale = scale;
        kernel(part, begin, end);
      });
  return Status::ok;
}

}  // namespace

Status fp4_matmul(const Fp4MatmulParams& p) {
  Kernel kernel;
  if (const Status status = prepare(p, p.row_scale != nullptr, kernel); status != Status::ok) return status;
  split_blocks(
      p.parallel_for, p.m, p.weight.n, cost_of(p, kernel),
      [&](int64_t row, int64_t rows, int64_t begin, int64_t end) { kernel(rows_of(p, row, rows), begin, end); });
  return Status::ok;
}

Status fp4_int8_linear(const Int8QuantizeParams& quantize, const Fp4MatmulParams& product) {
  return linear(product, [&](int64_t row, int64_t count, int8_t* q, float* scale, ParallelFor parallel_for) {
    int8_quantize(rounded_to(quantize, row, count, q, scale, parallel_for));
  });
}

Status fp4_fp4_linear(const Fp4ActivationsParams& cast, const Fp4MatmulParams& product) {
  detail::Fp4RowCast row_cast;
  if (const Status status = row_cast.prepare(cast); status != Status::ok) return status;
  return linear(product, [&](int64_t row, int64_t count, int8_t* q, float* scale, ParallelFor parallel_for) {
    Fp4ActivationsParams rows = cast;
    rows.x = static_cast<const char*>(cast.x) + row * cast.k * bytes_of(cast.dtype);
    rows.q = q, rows.row_scale = scale;
    split(parallel_for, count, static_cast<double>(cast.k) * row_cast.nanoseconds,
          [&](int64_t begin, int64_t end) { row_cast.rows(rows, row_cast.columns, begin, end); });
  });
}

}  // namespace bitmill

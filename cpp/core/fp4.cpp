// SPDX-License-Identifier: Apache-2.0
// The obvious form of every FP4 function. Casts compare the bits of magnitudes with seven steps, so a cast of
// a half-precision input is the cast of the float that it is, and no rounding happens on the way.
#include "fp4.h"

#include <algorithm>
#include <atomic>
#include <bit>

#include "cpu.h"
#include "layout.h"
#include "panel_matmul.h"

namespace bitmill {
namespace detail {
namespace {

bool valid_size(int64_t m, int64_t k) { return m >= 0 && k >= 0 && k <= kMaxColumns; }

uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu; }

uint32_t nibble(const uint8_t* packed, int64_t column) { return (packed[column / 2] >> (4 * (column % 2))) & 15u; }

float weight_scale(const Fp4Weight& w, int64_t groups, int64_t row, int64_t group) {
  const int64_t index = row * groups + group;
  return w.scale ? w.scale[index] : e8m0_to_float(w.scale_bytes[index]);
}

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
  return Status::ok;
}

template <class T>
bool cast_rows(const Fp4CastParams& p, const T* x, int64_t begin, int64_t end) {
  const Fp4Steps steps = fp4_steps(p.format);
  const uint32_t nan_code = p.nan == NanPolicy::max ? 7 : 0;
  const int64_t bytes = ceil_div(p.k, 2);
  bool any_nan = false;
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    const auto code = [&](int64_t column) -> uint32_t {
      if (column >= p.k) return 0;
      const uint32_t bits = std::bit_cast<uint32_t>(to_float(input[column]));
      const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
      any_nan |= nan;
      return nan ? nan_code : fp4_code(bits, steps);
    };
    for (int64_t i = 0; i < bytes; ++i) {
      p.packed[row * bytes + i] = static_cast<uint8_t>(code(2 * i) | (code(2 * i + 1) << 4));
    }
  }
  return any_nan;
}

template <class T>
void quantize_rows(const Mxfp4QuantizeParams& p, const T* x, int64_t begin, int64_t end) {
  constexpr Fp4Steps steps = fp4_steps(kE2M1);
  const int64_t blocks = ceil_div(p.k, kMxBlock), bytes = ceil_div(p.k, 2);
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kMxBlock, last = std::min(p.k, first + kMxBlock);
      uint32_t amax = 0;  // bits of magnitudes are in the order of their values, with infinity and NaN above
      for (int64_t j = first; j < last; ++j) amax = std::max(amax, magnitude_bits(to_float(input[j])));
      const uint8_t scale = mxfp4_scale(amax, p.rule);
      p.scale[row * blocks + block] = scale;
      // 1 / 2^E is exact and normal: a finite block has at most byte 253.
      const float inverse = std::bit_cast<float>((254u - std::min<uint32_t>(scale, 253u)) << 23);
      const auto code = [&](int64_t column) -> uint32_t {
        if (column >= last || scale == 255) return 0;
        return fp4_code(std::bit_cast<uint32_t>(to_float(input[column]) * inverse), steps);
      };
      for (int64_t j = first; j < last; j += 2) {
        p.packed[row * bytes + j / 2] = static_cast<uint8_t>(code(j) | (code(j + 1) << 4));
      }
    }
  }
}

}  // namespace

bool fp4_cast_rows_generic(const Fp4CastParams& p, int64_t begin, int64_t end) {
  return with_dtype(p.dtype, p.x, [&](const auto* x) { return cast_rows(p, x, begin, end); });
}

void mxfp4_quantize_rows_generic(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) { quantize_rows(p, x, begin, end); });
}

}  // namespace detail

Status fp4_cast(const Fp4CastParams& p) {
  if (!detail::valid_size(p.m, p.k)) return Status::bad_size;
  std::atomic<bool> any_nan = false;
  split(p.parallel_for, p.m, static_cast<double>(p.k) * 2.0, [&](int64_t begin, int64_t end) {
    if (detail::fp4_cast_rows_generic(p, begin, end)) any_nan = true;
  });
  return p.nan == NanPolicy::error && any_nan ? Status::bad_argument : Status::ok;
}

Status fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values,
                  ParallelFor parallel_for) {
  if (!detail::valid_size(m, k)) return Status::bad_size;
  const Fp4Table table = fp4_table(format);
  split(parallel_for, m, static_cast<double>(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* codes = packed + row * ceil_div(k, 2);
      for (int64_t j = 0; j < k; ++j) values[row * k + j] = table.value[detail::nibble(codes, j)];
    }
  });
  return Status::ok;
}

Status e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
  if (count < 0) return Status::bad_size;
  with_dtype(dtype, x, [&](const auto* values) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = e8m0_from_bits(std::bit_cast<uint32_t>(to_float(values[i])), up);
  });
  return Status::ok;
}

Status e8m0_uncast(const uint8_t* bytes, int64_t count, float* values) {
  if (count < 0) return Status::bad_size;
  std::transform(bytes, bytes + count, values, e8m0_to_float);
  return Status::ok;
}

Status mxfp4_quantize(const Mxfp4QuantizeParams& p) {
  if (!detail::valid_size(p.m, p.k)) return Status::bad_size;
  split(p.parallel_for, p.m, static_cast<double>(p.k) * 2.5,
        [&](int64_t begin, int64_t end) { detail::mxfp4_quantize_rows_generic(p, begin, end); });
  return Status::ok;
}

Status mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values,
                        ParallelFor parallel_for) {
  if (!detail::valid_size(m, k)) return Status::bad_size;
  constexpr Fp4Table table = fp4_table(kE2M1);
  const int64_t blocks = ceil_div(k, kMxBlock);
  split(parallel_for, m, static_cast<double>(k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* codes = packed + row * ceil_div(k, 2);
      for (int64_t j = 0; j < k; ++j) {
        const float unit = e8m0_to_float(scale[row * blocks + j / kMxBlock]);
        values[row * k + j] = unit * table.value[detail::nibble(codes, j)];
      }
    }
  });
  return Status::ok;
}

Status fp4_weight(const Fp4Weight& w, float* values, ParallelFor parallel_for) {
  if (const Status status = detail::check(w); status != Status::ok) return status;
  const detail::PanelShape shape{0, w.n, w.k, w.group_size};
  const int64_t groups = shape.groups(), words = word_count(w.k, 4);
  split(parallel_for, w.n, static_cast<double>(w.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* lane = w.tiles + (row / kTileRows) * words * kTileRows + row % kTileRows;
      for (int64_t j = 0; j < w.k; ++j) {
        const uint32_t code = (static_cast<uint32_t>(lane[(j / 8) * kTileRows]) >> (4 * (j % 8))) & 15u;
        values[row * w.k + j] = detail::weight_scale(w, groups, row, j / shape.group_width()) * w.table[code];
      }
    }
  });
  return Status::ok;
}

#ifdef BITMILL_AVX512
// bfloat16 rows enough to fill a block, times 16 values that bfloat16 holds exactly, on a machine that multiplies them.
static bool multiplies_in_bfloat16(const Fp4MatmulParams& p) {
  const float* table = p.weight.table;
  return p.dtype == Dtype::bf16 && p.m >= 4 && has_bf16_dot() &&
         std::all_of(table, table + 16, [](float value) { return (std::bit_cast<uint32_t>(value) & 0xFFFFu) == 0; });
}
#endif

Status fp4_matmul(const Fp4MatmulParams& p) {
  if (p.m < 0) return Status::bad_size;
  if (const Status status = detail::check(p.weight); status != Status::ok) return status;
  const Fp4Weight& w = p.weight;
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && p.m > 0 && w.k > 0) {
    const double nanoseconds = static_cast<double>(p.m + 2) * static_cast<double>(w.k) * kTileRows * 0.02;
    auto* tiles = multiplies_in_bfloat16(p) ? detail::fp4_matmul_tiles_avx512bf16 : detail::fp4_matmul_tiles_avx512;
    split(p.parallel_for, tile_count(w.n), nanoseconds, [&](int64_t begin, int64_t end) { tiles(p, begin, end); });
    return Status::ok;
  }
#endif
  const detail::PanelShape shape{p.m, w.n, w.k, w.group_size};
  const int64_t groups = shape.groups();
  const auto decode = [&](int64_t tile, int64_t begin, int64_t end, float* panel) {
    detail::decode_tile(w, tile, begin, end, panel);
  };
  const auto finish = [&](int64_t, int64_t tile, int64_t lane, int64_t group, float sum, float& value) {
    value += detail::weight_scale(w, groups, tile * kTileRows + lane, group) * sum;
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

// SPDX-License-Identifier: Apache-2.0
#include "nvfp4.h"

#include <algorithm>

#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace {

// A value, roughly.
constexpr double kNanoseconds = 2.0, kVectorNanoseconds = 0.2;

template <class T>
void quantize_rows(const Nvfp4QuantizeParams& p, const T* x, int64_t begin, int64_t end) {
  constexpr Fp4Distances distances = fp4_distances(kE2M1);
  const Fp4Steps steps = fp4_steps(kE2M1, p.rounding);
  const bool stochastic = p.rounding == Rounding::stochastic;
  const float global_scale = p.global_scale ? *p.global_scale : 1.0f;
  RandomWords random(p.random);
  const int64_t blocks = ceil_div(p.k, kNvBlock), bytes = ceil_div(p.k, 2);
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kNvBlock, last = std::min(p.k, first + kNvBlock);
      uint32_t amax = 0;
      for (int64_t j = first; j < last; ++j) {
        amax = std::max(amax, std::bit_cast<uint32_t>(to_float(input[j])) & 0x7FFFFFFFu);
      }
      const ScaledBlock scaled = nvfp4_scaled(amax, global_scale);
      p.scale[row * blocks + block] = scaled.byte;
      const auto code = [&](int64_t column) -> uint32_t {
        if (column >= last || !scaled.valid) return 0;
        const uint32_t bits = std::bit_cast<uint32_t>(to_float(input[column]) * scaled.inverse);
        const uint32_t code = fp4_code(bits, steps);
        return stochastic ? fp4_round_up(code, bits, distances, random(row * p.k + column)) : code;
      };
      for (int64_t j = first; j < last; j += 2) {
        p.packed[row * bytes + j / 2] = static_cast<uint8_t>(code(j) | (code(j + 1) << 4));
      }
    }
  }
}

bool valid_size(int64_t m, int64_t k) { return m >= 0 && k >= 0 && k <= kMaxColumns; }

}  // namespace

Status nvfp4_quantize(const Nvfp4QuantizeParams& p) {
  if (!valid_size(p.m, p.k)) return Status::bad_size;
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && p.rounding != Rounding::stochastic) {
    split(p.parallel_for, p.m, static_cast<double>(p.k) * kVectorNanoseconds,
          [&](int64_t begin, int64_t end) { detail::nvfp4_quantize_rows_avx512(p, begin, end); });
    return Status::ok;
  }
#endif
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    auto* quantize = p.rounding == Rounding::stochastic ? detail::nvfp4_quantize_rows_stochastic_avx2
                                                        : detail::nvfp4_quantize_rows_avx2;
    split(p.parallel_for, p.m, static_cast<double>(p.k) * kVectorNanoseconds,
          [&](int64_t begin, int64_t end) { quantize(p, begin, end); });
    return Status::ok;
  }
#endif
  split(p.parallel_for, p.m, static_cast<double>(p.k) * kNanoseconds, [&](int64_t begin, int64_t end) {
    with_dtype(p.dtype, p.x, [&](const auto* x) { quantize_rows(p, x, begin, end); });
  });
  return Status::ok;
}

Status nvfp4_dequantize(const Nvfp4DequantizeParams& p) {
  if (!valid_size(p.m, p.k)) return Status::bad_size;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    split(p.parallel_for, p.m, static_cast<double>(p.k) * kVectorNanoseconds,
          [&](int64_t begin, int64_t end) { detail::nvfp4_dequantize_rows_avx2(p, begin, end); });
    return Status::ok;
  }
#endif
  constexpr Fp4Table table = fp4_table(kE2M1);
  const float global_scale = p.global_scale ? *p.global_scale : 1.0f;
  split(p.parallel_for, p.m, static_cast<double>(p.k) * kNanoseconds, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t *codes = p.packed + row * ceil_div(p.k, 2), *scale = p.scale + row * ceil_div(p.k, kNvBlock);
      for (int64_t j = 0; j < p.k; ++j) {
        const float e2m1 = table.value[(codes[j / 2] >> (4 * (j % 2))) & 15];
        p.values[row * p.k + j] = nvfp4_value(scale[j / kNvBlock], e2m1, global_scale);
      }
    }
  });
  return Status::ok;
}

}  // namespace bitmill

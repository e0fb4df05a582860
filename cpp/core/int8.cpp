// SPDX-License-Identifier: Apache-2.0
// The obvious form of the int8 rounding, and the choice of the instruction set.
#include "int8.h"

#include <bit>
#include <cmath>

#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace detail {

void int8_quantize_rows_generic(const Int8QuantizeParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) {
    for (int64_t row = begin; row < end; ++row) {
      uint32_t largest = 0;  // bits of a magnitude: they rise with it, and NaN lies above infinity
      for (int64_t i = row * p.k; i < (row + 1) * p.k; ++i) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(to_float(x[i])) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float amax = std::bit_cast<float>(largest), inverse = 127.0f / amax;
      int32_t total = 0;
      for (int64_t i = row * p.k; i < (row + 1) * p.k; ++i) {
        const float scaled = to_float(x[i]) * inverse;
        p.q[i] = std::isfinite(scaled) ? static_cast<int8_t>(std::nearbyint(scaled)) : int8_t{0};
        total += p.q[i];
      }
      p.scale[row] = amax / 127.0f;
      if (p.total) p.total[row] = total;
    }
  });
}

}  // namespace detail

Status int8_quantize(const Int8QuantizeParams& p) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  auto* rows = detail::int8_quantize_rows_generic;
  double nanoseconds = 2.0;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    rows = detail::int8_quantize_rows_avx2;
    nanoseconds = 0.2;
  }
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) {
    rows = detail::int8_quantize_rows_avx512;
    nanoseconds = 0.1;
  }
#endif
  split(p.parallel_for, p.m, static_cast<double>(p.k) * nanoseconds,
        [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return Status::ok;
}

Int8QuantizeParams rounded_to(Int8QuantizeParams p, int64_t row, int64_t rows, int8_t* q, float* scale,
                              ParallelFor parallel_for) {
  p.x = static_cast<const char*>(p.x) + row * p.k * bytes_of(p.dtype);
  p.m = rows;
  p.q = q, p.scale = scale;
  p.parallel_for = parallel_for;
  return p;
}

}  // namespace bitmill

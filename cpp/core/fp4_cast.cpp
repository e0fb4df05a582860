// SPDX-License-Identifier: Apache-2.0
// The obvious form of the FP4 casts, and the choice of the instruction set. Casts compare the bits of magnitudes with
// seven steps, so a cast of a half-precision input is the cast of the float that it is, and no rounding happens on the
// way.
#include <algorithm>
#include <atomic>
#include <bit>

#include "cpu.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill {
namespace detail {
namespace {

uint32_t magnitude_bits(float x) { return std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu; }

uint32_t nibble(const uint8_t* packed, int64_t column) { return (packed[column / 2] >> (4 * (column % 2))) & 15u; }

template <class T>
bool cast_rows(const Fp4CastParams& p, const T* x, int64_t begin, int64_t end) {
  const Fp4Steps steps = fp4_steps(p.format, p.rounding);
  const Fp4Distances distances = fp4_distances(p.format);
  const bool stochastic = p.rounding == Rounding::stochastic;
  RandomWords random(p.random);
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
      if (nan) return nan_code;
      const uint32_t code = fp4_code(bits, steps);
      return stochastic ? fp4_round_up(code, bits, distances, random(row * p.k + column)) : code;
    };
    for (int64_t i = 0; i < bytes; ++i) {
      p.packed[row * bytes + i] = static_cast<uint8_t>(code(2 * i) | (code(2 * i + 1) << 4));
    }
  }
  return any_nan;
}

template <class T>
void quantize_rows(const Mxfp4QuantizeParams& p, const T* x, int64_t begin, int64_t end) {
  constexpr Fp4Distances distances = fp4_distances(kE2M1);
  const Fp4Steps steps = fp4_steps(kE2M1, p.rounding);
  const bool stochastic = p.rounding == Rounding::stochastic;
  RandomWords random(p.random);
  const int64_t blocks = ceil_div(p.k, kMxBlock), bytes = ceil_div(p.k, 2);
  for (int64_t row = begin; row < end; ++row) {
    const T* input = x + row * p.row_stride;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kMxBlock, last = std::min(p.k, first + kMxBlock);
      uint32_t amax = 0;  // bits of magnitudes are in the order of their values, with infinity and NaN above
      for (int64_t j = first; j < last; ++j) amax = std::max(amax, magnitude_bits(to_float(input[j])));
      const ScaledBlock scaled = mxfp4_scaled(amax, p.rule);
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

}  // namespace

bool fp4_cast_rows_generic(const Fp4CastParams& p, int64_t begin, int64_t end) {
  return with_dtype(p.dtype, p.x, [&](const auto* x) { return cast_rows(p, x, begin, end); });
}

void mxfp4_quantize_rows_generic(const Mxfp4QuantizeParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&](const auto* x) { quantize_rows(p, x, begin, end); });
}

void fp4_uncast_rows_generic(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                             int64_t end) {
  const Fp4Table table = fp4_table(format);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* codes = packed + row * ceil_div(k, 2);
    for (int64_t j = 0; j < k; ++j) values[row * k + j] = table.value[nibble(codes, j)];
  }
}

void mxfp4_dequantize_rows_generic(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                   int64_t end) {
  constexpr Fp4Table table = fp4_table(kE2M1);
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t *codes = packed + row * ceil_div(k, 2), *units = scale + row * ceil_div(k, kMxBlock);
    for (int64_t j = 0; j < k; ++j) {
      values[row * k + j] = e8m0_to_float(units[j / kMxBlock]) * table.value[nibble(codes, j)];
    }
  }
}

void e8m0_cast_generic(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
  with_dtype(dtype, x, [&](const auto* values) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = e8m0_from_bits(std::bit_cast<uint32_t>(to_float(values[i])), up);
  });
}

void e8m0_uncast_generic(const uint8_t* bytes, int64_t count, float* values) {
  std::transform(bytes, bytes + count, values, e8m0_to_float);
}

}  // namespace detail

namespace {

bool valid_size(int64_t m, int64_t k) { return m >= 0 && k >= 0 && k <= kMaxColumns; }

struct CastKernels {
  decltype(&detail::fp4_cast_rows_generic) cast;
  decltype(&detail::fp4_uncast_rows_generic) uncast;
  decltype(&detail::mxfp4_quantize_rows_generic) quantize;
  decltype(&detail::mxfp4_dequantize_rows_generic) dequantize;
  decltype(&detail::e8m0_cast_generic) e8m0_cast;
  decltype(&detail::e8m0_uncast_generic) e8m0_uncast;
  double nanoseconds;  // a value, roughly
};

const CastKernels& cast_kernels(Rounding rounding = Rounding::nearest_even) {
  using namespace detail;
#ifdef BITMILL_AVX512
  static constexpr CastKernels kAvx512{fp4_cast_rows_avx512,
                                       fp4_uncast_rows_avx512,
                                       mxfp4_quantize_rows_avx512,
                                       mxfp4_dequantize_rows_avx512,
                                       e8m0_cast_avx512,
                                       e8m0_uncast_avx512,
                                       0.2};
  static constexpr CastKernels kStochastic{fp4_cast_rows_stochastic_avx512,
                                           fp4_uncast_rows_avx512,
                                           mxfp4_quantize_rows_stochastic_avx512,
                                           mxfp4_dequantize_rows_avx512,
                                           e8m0_cast_avx512,
                                           e8m0_uncast_avx512,
                                           0.6};
  if (selected() == InstructionSet::avx512) return rounding == Rounding::stochastic ? kStochastic : kAvx512;
#endif
#ifdef BITMILL_EIGHT_LANES
  static constexpr CastKernels kAvx2{fp4_cast_rows_avx2,
                                     fp4_uncast_rows_avx2,
                                     mxfp4_quantize_rows_avx2,
                                     mxfp4_dequantize_rows_avx2,
                                     e8m0_cast_avx2,
                                     e8m0_uncast_avx2,
                                     0.3};
  static constexpr CastKernels kAvx2Stochastic{fp4_cast_rows_stochastic_avx2,
                                               fp4_uncast_rows_avx2,
                                               mxfp4_quantize_rows_stochastic_avx2,
                                               mxfp4_dequantize_rows_avx2,
                                               e8m0_cast_avx2,
                                               e8m0_uncast_avx2,
                                               1.0};
  if (eight_lanes()) return rounding == Rounding::stochastic ? kAvx2Stochastic : kAvx2;
#endif
  static constexpr CastKernels kGeneric{fp4_cast_rows_generic,
                                        fp4_uncast_rows_generic,
                                        mxfp4_quantize_rows_generic,
                                        mxfp4_dequantize_rows_generic,
                                        e8m0_cast_generic,
                                        e8m0_uncast_generic,
                                        2.0};
  return kGeneric;
}

}  // namespace

Status fp4_cast(const Fp4CastParams& p) {
  if (!valid_size(p.m, p.k)) return Status::bad_size;
  const CastKernels& kernels = cast_kernels(p.rounding);
  std::atomic<bool> any_nan = false;
  split(p.parallel_for, p.m, static_cast<double>(p.k) * kernels.nanoseconds, [&](int64_t begin, int64_t end) {
    if (kernels.cast(p, begin, end)) any_nan = true;
  });
  return p.nan == NanPolicy::error && any_nan ? Status::bad_argument : Status::ok;
}

Status fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values,
                  ParallelFor parallel_for) {
  if (!valid_size(m, k)) return Status::bad_size;
  const CastKernels& kernels = cast_kernels();
  split(parallel_for, m, static_cast<double>(k) * kernels.nanoseconds,
        [&](int64_t begin, int64_t end) { kernels.uncast(packed, k, format, values, begin, end); });
  return Status::ok;
}

Status e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
  if (count < 0) return Status::bad_size;
  cast_kernels().e8m0_cast(x, dtype, count, up, bytes);
  return Status::ok;
}

Status e8m0_uncast(const uint8_t* bytes, int64_t count, float* values) {
  if (count < 0) return Status::bad_size;
  cast_kernels().e8m0_uncast(bytes, count, values);
  return Status::ok;
}

Status mxfp4_quantize(const Mxfp4QuantizeParams& p) {
  if (!valid_size(p.m, p.k)) return Status::bad_size;
  const CastKernels& kernels = cast_kernels(p.rounding);
  split(p.parallel_for, p.m, static_cast<double>(p.k) * kernels.nanoseconds,
        [&](int64_t begin, int64_t end) { kernels.quantize(p, begin, end); });
  return Status::ok;
}

Status mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values,
                        ParallelFor parallel_for) {
  if (!valid_size(m, k)) return Status::bad_size;
  const CastKernels& kernels = cast_kernels();
  split(parallel_for, m, static_cast<double>(k) * kernels.nanoseconds,
        [&](int64_t begin, int64_t end) { kernels.dequantize(packed, scale, k, values, begin, end); });
  return Status::ok;
}

}  // namespace bitmill

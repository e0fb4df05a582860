// SPDX-License-Identifier: Apache-2.0
// The obvious form of activations as 4-bit floats, and the choice of the instruction set.
#include "fp4_activations.h"

#include <algorithm>
#include <bit>

#include "cpu.h"
#include "layout.h"

namespace bitmill {
namespace detail {
namespace {

uint32_t magnitude(float value) { return std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu; }

// The integers of the codes of a format, and the cast to them.
struct Caster {
  Fp4Steps steps;
  Fp4Integers integers;

  explicit Caster(Fp4Format format) : steps(fp4_steps(format)) { fp4_integers(fp4_table(format).value, integers); }
  int8_t operator()(float value) const { return integers.value[fp4_code(std::bit_cast<uint32_t>(value), steps)]; }
};

// Columns [begin, end) of a row whose values are multiplied with `factor` first.
template <class T>
float block(const Fp4ActivationsParams& p, const Caster& cast, const T* x, float factor, int64_t begin, int64_t end,
            int8_t* q) {
  uint32_t amax = 0;
  for (int64_t j = begin; j < end; ++j) amax = std::max(amax, magnitude(to_float(x[j]) * factor));
  const BlockScale found = p.kind == Fp4Activations::mxfp4 ? mxfp4_block(amax, p.rule) : nvfp4_block(amax);
  const bool valid = found.scale == found.scale;
  for (int64_t j = begin; j < end; ++j) {
    q[j] = valid ? cast(to_float(x[j]) * factor * found.inverse) : int8_t{0};
  }
  return found.scale;
}

}  // namespace

void fp4_activations_rows_generic(const Fp4ActivationsParams& p, const FpqColumns& columns, int64_t begin,
                                  int64_t end) {
  const Caster cast(p.format);
  const int64_t groups = p.groups(), width = p.kind == Fp4Activations::mxfp4 ? kMxBlock : kNvBlock;
  with_dtype(p.dtype, p.x, [&](const auto* all) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* x = all + row * p.k;
      int8_t* q = p.q + row * p.k;
      float* scale = p.row_scale + row * groups;
      if (p.kind == Fp4Activations::fpq) {
        bool nan = false;
        for (int64_t j = 0; j < p.k; ++j) {
          const float value = to_float(x[j]) / columns.step[j];
          nan |= value != value;
          q[j] = value == value ? static_cast<int8_t>(cast(value) * (1 << columns.left[j])) : int8_t{0};
        }
        *scale = nan ? std::numeric_limits<float>::quiet_NaN() : columns.row_scale;
        continue;
      }
      BlockScale whole{1.0f, 1.0f};
      if (p.kind == Fp4Activations::nvfp4) {
        uint32_t amax = 0;
        for (int64_t j = 0; j < p.k; ++j) amax = std::max(amax, magnitude(to_float(x[j])));
        whole = nvfp4_row(amax);
      }
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * width, last = std::min(p.k, first + width);
        scale[group] = block(p, cast, x, whole.inverse, first, last, q) * whole.scale * 0.5f;
      }
    }
  });
}

Status Fp4RowCast::prepare(const Fp4ActivationsParams& p) {
  if (p.m < 0 || p.k < 0 || p.k > kMaxColumns) return Status::bad_size;
  if (p.kind == Fp4Activations::fpq) {
    const int most = (1 << p.format.exponent_bits) - 1;
    if (most > 3) return Status::bad_argument;
    step.resize(static_cast<size_t>(p.k));
    left.resize(static_cast<size_t>(p.k));
    for (int64_t j = 0; j < p.k; ++j) {
      const int shift = p.shift ? p.shift[j] : 0;
      if (shift > most) return Status::bad_argument;
      step[static_cast<size_t>(j)] = p.scale / static_cast<float>(1 << shift);
      left[static_cast<size_t>(j)] = most - shift;
    }
    columns = {step.data(), left.data(), p.scale * (0.5f / static_cast<float>(1 << most))};
  }
  rows = fp4_activations_rows_generic;
  nanoseconds = 4.0;
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    rows = fp4_activations_rows_avx2;
    nanoseconds = 0.8;
  }
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) {
    rows = fp4_activations_rows_avx512;
    nanoseconds = 0.4;
  }
#endif
  return Status::ok;
}

}  // namespace detail

Status fp4_activations(const Fp4ActivationsParams& p) {
  detail::Fp4RowCast cast;
  if (const Status status = cast.prepare(p); status != Status::ok) return status;
  split(p.parallel_for, p.m, static_cast<double>(p.k) * cast.nanoseconds,
        [&](int64_t begin, int64_t end) { cast.rows(p, cast.columns, begin, end); });
  return Status::ok;
}

}  // namespace bitmill

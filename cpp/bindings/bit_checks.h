// SPDX-License-Identifier: Apache-2.0
// What the ops of packed bits ask of their arguments, beyond checks.h.
#pragma once

#include <optional>
#include <string>

#include "binary_matmul.h"
#include "bitpack.h"
#include "checks.h"
#include "layout.h"

namespace bitmill {

inline constexpr const char* kPackRemedy = "; pack the weight with bitmill.ops.tile_pack";

inline Levels levels_of(const char* op, const std::string& levels) {
  if (levels == "sign") return Levels::sign;
  if (levels == "plus") return Levels::plus;
  if (levels == "bool") return Levels::bool_;
  fail(op, ": levels must be \"sign\", \"plus\" or \"bool\", got \"", levels, "\"");
}

// The kernels count whole words, so bits past k must be 0. `count` last words lie `stride` words apart.
inline void check_padding(const char* op, const char* name, const int32_t* last, int64_t count, int64_t stride,
                          int64_t k) {
  if (k % 32 == 0) return;
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint32_t>(last[i * stride]);
  if (bits >> (k % 32)) fail(op, ": the bits of ", name, " past column k = ", k, " must be 0, got 1; pack it again");
}

inline void check_row_padding(const char* op, const char* name, const Tensor& rows, int64_t m, int64_t k) {
  check_padding(op, name, data<int32_t>(rows) + word_count(k) - 1, m, word_count(k), k);
}

inline void check_tile_padding(const char* op, const char* name, const Tensor& tiles, int64_t n, int64_t k) {
  for (int64_t tile = 0; k > 0 && tile < tile_count(n); ++tile) {
    const int32_t* last = data<int32_t>(tiles) + ((tile + 1) * word_count(k) - 1) * kTileRows;
    check_padding(op, name, last, kTileRows, 1, k);
  }
}

// What packing rows asks for; the planes go where the caller says.
inline BitpackParams pack_rows(const char* op, const Rows& rows, const std::optional<Tensor>& shift_row, Levels levels,
                               double threshold) {
  BitpackParams p;
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.k = p.row_stride = rows.k;
  p.shift = data_or_null<float>(shift_row);
  p.threshold = static_cast<float>(threshold);
  p.levels = levels;
  p.parallel_for = torch_parallel_for;
  return p;
}

// What a product reads of packed rows; `zeros`: they have a plane of nonzero bits.
inline Operand operand_of(Levels levels, bool zeros) {
  return levels == Levels::bool_ ? Operand::bool_ : zeros ? Operand::ternary : Operand::sign;
}

// A checked weight of n x k bits, as tiles.
struct BinaryWeight {
  Tensor tiles;
  std::optional<Tensor> nonzero;
  int64_t n, k;

  // The product of m rows with it; the rows and where results go are the caller's.
  BinaryMatmulParams product(int64_t m) const {
    BinaryMatmulParams p;
    p.weight = data<int32_t>(tiles);
    p.weight_nonzero = data_or_null<int32_t>(nonzero);
    p.m = m;
    p.n = n;
    p.k = k;
    p.parallel_for = torch_parallel_for;
    return p;
  }

  // The product of m rows of more than bits with it, into `out` [m, n]; the rows are the caller's.
  template <class Params>
  Params product(int64_t m, const Tensor& scale, int64_t group_size, const std::optional<Tensor>& bias,
                 const Tensor& out) const {
    Params p;
    p.weight = data<int32_t>(tiles);
    p.weight_nonzero = data_or_null<int32_t>(nonzero);
    p.m = m;
    p.n = n;
    p.k = k;
    p.scale = data<float>(scale);
    p.group_size = group_size;
    p.bias = data_or_null<float>(bias);
    p.out = out.mutable_data_ptr();
    p.parallel_for = torch_parallel_for;
    return p;
  }

  // The product of rows of floats with it, into `out` of their dtype.
  BinaryWeightMatmulParams product(const char* op, const Rows& rows, const Tensor& scale, int64_t group_size,
                                   const std::optional<Tensor>& bias, const Tensor& out) const {
    auto p = product<BinaryWeightMatmulParams>(rows.m, scale, group_size, bias, out);
    p.x = rows.x.const_data_ptr();
    p.dtype = float_dtype(op, rows.x);
    return p;
  }
};

inline BinaryWeight binary_weight(const char* op, const Tensor& weight, const std::optional<Tensor>& nonzero, int64_t n,
                                  int64_t k, const std::string& name = "weight") {
  const Sizes sizes = tile_sizes(n, k);
  BinaryWeight w{checked(op, name.c_str(), weight, ScalarType::Int, sizes, kPackRemedy),
                 checked(op, (name + "_nonzero").c_str(), nonzero, ScalarType::Int, sizes), n, k};
  check_tile_padding(op, name.c_str(), w.tiles, n, k);
  return w;
}

// What n outputs of a product become as bits, checked; of several products with as many `leading` sizes.
struct OutputRanges {
  Tensor positive;
  std::optional<Tensor> negative, single;
  int64_t n, single_count;

  // Of the product at `index`; `nonzero` is not written without negative ranges.
  BitOutput output(int32_t* sign, int32_t* nonzero, int64_t index = 0) const {
    BitOutput out;
    out.sign = sign;
    out.positive = data<int32_t>(positive) + index * 2 * n;
    if (!negative) return out;
    out.nonzero = nonzero;
    out.negative = data<int32_t>(*negative) + index * 2 * n;
    out.single = single ? data<int32_t>(*single) + index * n * single_count : nullptr;
    out.single_count = single_count;
    return out;
  }
};

inline OutputRanges output_ranges(const char* op, const Tensor& positive, const std::optional<Tensor>& negative,
                                  const std::optional<Tensor>& single, const Sizes& leading, int64_t n,
                                  const std::string& prefix = "") {
  const Sizes sizes = with_last(with_last(leading, 2), n);
  const Tensor above = checked(op, (prefix + "positive").c_str(), positive, ScalarType::Int, sizes);
  const auto below = checked(op, (prefix + "negative").c_str(), negative, ScalarType::Int, sizes);
  const Sizes outputs = with_last(leading, n);
  if (single && (!negative || single->dim() != static_cast<int64_t>(sizes.size()))) {
    fail(op, ": ", prefix, "single must have shape ", leading.empty() ? "[n, count]" : "[products, n, count]",
         " and goes with negative, got ", to_string(sizes_of(*single)), negative ? "" : " without negative");
  }
  const int64_t count = single ? single->size(single->dim() - 1) : 0;
  return {above, below, checked(op, (prefix + "single").c_str(), single, ScalarType::Int, with_last(outputs, count)), n,
          count};
}

}  // namespace bitmill

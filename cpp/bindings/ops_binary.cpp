// SPDX-License-Identifier: Apache-2.0
// CPU ops of the bitpack and binary_matmul families: check, allocate, call. Schemas: python/bitmill/ops.
#include "binary_int8_matmul.h"
#include "binary_matmul.h"
#include "bit_checks.h"
#include "bitpack.h"
#include "boxing.h"
#include "checks.h"
#include "int8_rows.h"
#include "row_steps.h"

namespace bitmill {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> bitpack_cpu(Tensor x, std::optional<Tensor> shift, std::string levels,
                                                       double threshold, bool mean) {
  const char* op = "bitpack";
  const Levels kind = levels_of(op, levels);
  const Rows rows = rows_of(op, x);
  const auto shift_row = checked(op, "shift", shift, ScalarType::Float, {rows.k});
  BitpackParams p = pack_rows(op, rows, shift_row, kind, threshold);
  const Sizes plane = with_last(rows.leading, word_count(rows.k));
  const bool two_planes = kind == Levels::sign;
  const Tensor sign = new_tensor(plane, ScalarType::Int), count = new_tensor(rows.leading, ScalarType::Int);
  const Tensor nonzero = new_tensor(two_planes ? plane : Sizes{0}, ScalarType::Int);
  const Tensor means = new_tensor(mean ? rows.leading : Sizes{0}, ScalarType::Float);
  p.sign = mutable_data<int32_t>(sign);
  p.nonzero = two_planes ? mutable_data<int32_t>(nonzero) : nullptr;
  p.count = mutable_data<int32_t>(count);
  p.mean = mean ? mutable_data<float>(means) : nullptr;
  require(op, bitpack(p));
  return {sign, nonzero, count, means};
}

Tensor bitunpack_cpu(Tensor sign, std::optional<Tensor> nonzero, int64_t k) {
  const Rows rows = rows_of("bitunpack", sign);
  if (k < 0 || k > kMaxColumns || rows.k != word_count(k)) {
    fail("bitunpack: sign must have ceil(k / 32) words in its last dimension, got k = ", k, " and ", rows.k, " words");
  }
  check("bitunpack", "sign", sign, ScalarType::Int, sizes_of(sign));
  const auto plane = checked("bitunpack", "nonzero", nonzero, ScalarType::Int, sizes_of(sign));
  const Tensor values = new_tensor(with_last(rows.leading, k), ScalarType::Char);
  require("bitunpack",
          bitunpack(data<int32_t>(rows.x), data_or_null<int32_t>(plane), rows.m, k, mutable_data<int8_t>(values)));
  return values;
}

int tile_bits(const char* op, int64_t bits) {
  if (bits != 1 && bits != 4 && bits != 8) fail(op, ": bits must be 1, 4 or 8, got ", bits);
  return static_cast<int>(bits);
}

Tensor tile_pack_cpu(Tensor codes, int64_t bits) {
  if (codes.dim() != 2) fail("tile_pack: codes must have shape [n, k], got ", to_string(sizes_of(codes)));
  const Tensor rows = checked("tile_pack", "codes", codes, ScalarType::Byte, sizes_of(codes));
  const int64_t n = rows.size(0), k = rows.size(1);
  const Tensor tiles = new_tensor(tile_sizes(n, k, tile_bits("tile_pack", bits)), ScalarType::Int);
  require("tile_pack", tile_pack(data<uint8_t>(rows), n, k, static_cast<int>(bits), mutable_data<int32_t>(tiles)));
  return tiles;
}

Tensor tile_unpack_cpu(Tensor tiles, int64_t n, int64_t k, int64_t bits) {
  if (n < 0 || k < 0 || k > kMaxColumns)
    fail("tile_unpack: n must be at least 0 and k between 0 and 16777216, got n = ", n, ", k = ", k);
  const Sizes sizes = tile_sizes(n, k, tile_bits("tile_unpack", bits));
  const Tensor words = checked("tile_unpack", "tiles", tiles, ScalarType::Int, sizes);
  const Tensor codes = new_tensor({n, k}, ScalarType::Byte);
  require("tile_unpack", tile_unpack(data<int32_t>(words), n, k, static_cast<int>(bits), mutable_data<uint8_t>(codes)));
  return codes;
}

// The operands of an integer product, checked; `params` points into them.
struct Operands {
  Rows rows;
  std::optional<Tensor> nonzero;
  BinaryWeight weight;
  BinaryMatmulParams params;
};

Operands operands(const char* op, const Tensor& a, const Tensor& weight, int64_t n, int64_t k,
                  const std::optional<Tensor>& a_nonzero, const std::optional<Tensor>& weight_nonzero,
                  const std::string& levels) {
  const Levels kind = levels_of(op, levels);
  if (n < 0 || k < 0 || k > kMaxColumns)
    fail(op, ": n must be at least 0 and k between 0 and 16777216, got n = ", n, ", k = ", k);
  if (a_nonzero && kind != Levels::sign) fail(op, ": a_nonzero goes with levels=\"sign\" only, got \"", levels, "\"");
  const Rows rows = rows_of(op, a);
  check(op, "a", a, ScalarType::Int, with_last(rows.leading, word_count(k)));
  const auto nonzero = checked(op, "a_nonzero", a_nonzero, ScalarType::Int, sizes_of(a));
  Operands o{rows, nonzero, binary_weight(op, weight, weight_nonzero, n, k), {}};
  if (k > 0) check_row_padding(op, "a", o.rows.x, o.rows.m, k);
  if (k > 0 && o.nonzero) check_row_padding(op, "a_nonzero", *o.nonzero, o.rows.m, k);
  o.params = o.weight.product(o.rows.m);
  o.params.a = data<int32_t>(o.rows.x);
  o.params.a_nonzero = data_or_null<int32_t>(o.nonzero);
  o.params.operand = operand_of(kind, o.nonzero.has_value());
  return o;
}

Tensor binary_matmul_cpu(Tensor a, Tensor weight, int64_t n, int64_t k, std::optional<Tensor> a_nonzero,
                         std::optional<Tensor> weight_nonzero, std::string levels) {
  Operands o = operands("binary_matmul", a, weight, n, k, a_nonzero, weight_nonzero, levels);
  const Tensor dot = new_tensor(with_last(o.rows.leading, n), ScalarType::Int);
  o.params.dot = mutable_data<int32_t>(dot);
  require("binary_matmul", binary_matmul(o.params));
  return dot;
}

std::tuple<Tensor, Tensor> binary_matmul_bits_cpu(Tensor a, Tensor weight, Tensor positive,
                                                  std::optional<Tensor> negative, std::optional<Tensor> single,
                                                  int64_t n, int64_t k, std::optional<Tensor> a_nonzero,
                                                  std::optional<Tensor> weight_nonzero, std::string levels) {
  const char* op = "binary_matmul_bits";
  Operands o = operands(op, a, weight, n, k, a_nonzero, weight_nonzero, levels);
  const OutputRanges ranges = output_ranges(op, positive, negative, single, {}, n);
  const Sizes plane = with_last(o.rows.leading, word_count(n));
  const Tensor sign = new_tensor(plane, ScalarType::Int);
  const Tensor nonzero = new_tensor(negative ? plane : Sizes{0}, ScalarType::Int);
  o.params.bits = ranges.output(mutable_data<int32_t>(sign), mutable_data<int32_t>(nonzero));
  if (o.rows.m > 0 && n > 0) require(op, binary_matmul(o.params));
  return {sign, nonzero};
}

Tensor binary_matmul_floats_cpu(Tensor a, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                                std::optional<Tensor> residual, int64_t k, std::optional<Tensor> a_nonzero,
                                std::optional<Tensor> weight_nonzero, std::string levels) {
  const char* op = "binary_matmul_floats";
  const int64_t n = scale.dim() > 0 ? scale.size(0) : 0;
  const Tensor scale_rows = checked(op, "scale", scale, ScalarType::Float, {n, 1});
  Operands o = operands(op, a, weight, n, k, a_nonzero, weight_nonzero, levels);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  const auto added = checked(op, "residual", residual, ScalarType::Float, with_last(o.rows.leading, n));
  const Tensor out = new_tensor(with_last(o.rows.leading, n), ScalarType::Float);
  o.params.residual = data_or_null<float>(added);
  o.params.out = out.mutable_data_ptr();
  o.params.scale = data<float>(scale_rows);
  o.params.bias = data_or_null<float>(bias_row);
  require(op, binary_matmul(o.params));
  return out;
}

Tensor binary_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                         std::optional<Tensor> weight_nonzero, std::optional<Tensor> shift, std::optional<Tensor> alpha,
                         std::string levels, bool row_scale, int64_t group_size,
                         std::string /* the surrogate of the backward */) {
  const char* op = "binary_linear";
  const Levels kind = levels_of(op, levels);
  const Rows rows = rows_of(op, x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const Sizes scales = {n, group_count(op, k, group_size)};
  const Tensor scale_rows = checked(op, "scale", scale, ScalarType::Float, scales);
  const BinaryWeight tiles = binary_weight(op, weight, weight_nonzero, n, k);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  const auto step = checked(op, "alpha", alpha, ScalarType::Float, {});
  const auto shift_row = checked(op, "shift", shift, ScalarType::Float, {k});
  BitpackParams pack = pack_rows(op, rows, shift_row, kind, (step ? *data<float>(*step) : 1.0f) / 2);
  const int64_t words = rows.m * word_count(k);
  const auto sign = scratch<int32_t>(words), nonzero = scratch<int32_t>(kind == Levels::sign ? words : 0);
  const auto mean = scratch<float>(row_scale ? rows.m : 0);
  pack.sign = sign.get();
  pack.nonzero = kind == Levels::sign ? nonzero.get() : nullptr;
  pack.mean = row_scale ? mean.get() : nullptr;
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  BinaryMatmulParams p = tiles.product(rows.m);
  p.a = pack.sign;
  p.a_nonzero = pack.nonzero;
  p.operand = operand_of(kind, pack.nonzero != nullptr);
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype(op, rows.x);
  p.scale = data<float>(scale_rows);
  p.group_size = group_size;
  p.row_scale = pack.mean;
  p.bias = data_or_null<float>(bias_row);
  const RowStep steps[] = {pack, p};
  require(op, row_steps(steps));
  return out;
}

Tensor binary_weight_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                                std::optional<Tensor> weight_nonzero, int64_t group_size, std::string activations) {
  const char* op = "binary_weight_linear";
  const bool int8 = multiplies_int8(op, activations);
  const Rows rows = rows_of(op, x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const Sizes scales = {n, group_count(op, k, group_size)};
  const Tensor scale_rows = checked(op, "scale", scale, ScalarType::Float, scales);
  const BinaryWeight tiles = binary_weight(op, weight, weight_nonzero, n, k);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  if (int8) {
    auto p = tiles.product<BinaryInt8MatmulParams>(rows.m, scale_rows, group_size, bias_row, out);
    p.out_dtype = float_dtype(op, rows.x);
    require(op, binary_int8_linear(int8_rows(op, rows), p));
    return out;
  }
  require(op, binary_weight_matmul(tiles.product(op, rows, scale_rows, group_size, bias_row, out)));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("bitpack", BITMILL_BOX(bitmill::bitpack_cpu));
  m.impl("bitunpack", BITMILL_BOX(bitmill::bitunpack_cpu));
  m.impl("tile_pack", BITMILL_BOX(bitmill::tile_pack_cpu));
  m.impl("tile_unpack", BITMILL_BOX(bitmill::tile_unpack_cpu));
  m.impl("binary_matmul", BITMILL_BOX(bitmill::binary_matmul_cpu));
  m.impl("binary_matmul_bits", BITMILL_BOX(bitmill::binary_matmul_bits_cpu));
  m.impl("binary_matmul_floats", BITMILL_BOX(bitmill::binary_matmul_floats_cpu));
  m.impl("binary_linear", BITMILL_BOX(bitmill::binary_linear_cpu));
  m.impl("binary_weight_linear", BITMILL_BOX(bitmill::binary_weight_linear_cpu));
}

// SPDX-License-Identifier: Apache-2.0
// CUDA ops: check, allocate, launch. Schemas: python/bitmill/ops. An op without a row here runs its default kernel.
#include "bit_checks.h"
#include "boxing.h"
#include "cuda_call.h"
#include "salient_arguments.h"
#include "zoned_arguments.h"

namespace bitmill {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> bitpack_cuda(Tensor x, std::optional<Tensor> shift, std::string levels,
                                                        double threshold, bool mean) {
  const char* op = "bitpack";
  const CudaCall call(op, "x", x);
  const Levels kind = levels_of(op, levels);
  const Rows rows = any_rows_of(op, x);
  const auto shift_row = call.checked("shift", shift, ScalarType::Float, {rows.k});
  BitpackParams p = pack_rows(op, rows, shift_row, kind, threshold);
  const Sizes plane = with_last(rows.leading, word_count(rows.k));
  const bool two_planes = kind == Levels::sign;
  const Tensor sign = call.new_tensor(plane, ScalarType::Int), count = call.new_tensor(rows.leading, ScalarType::Int);
  const Tensor nonzero = call.new_tensor(two_planes ? plane : Sizes{0}, ScalarType::Int);
  const Tensor means = call.new_tensor(mean ? rows.leading : Sizes{0}, ScalarType::Float);
  p.sign = mutable_data<int32_t>(sign);
  p.nonzero = two_planes ? mutable_data<int32_t>(nonzero) : nullptr;
  p.count = mutable_data<int32_t>(count);
  p.mean = mean ? mutable_data<float>(means) : nullptr;
  call.require(cuda::launch_bitpack(p, call.stream()));
  return {sign, nonzero, count, means};
}

// A weight of n x k bits on the call's device.
BinaryWeight cuda_weight(const CudaCall& call, const Tensor& weight, const std::optional<Tensor>& nonzero, int64_t n,
                         int64_t k) {
  return {call.tiles("weight", weight, n, k, 1, kPackRemedy), call.tiles("weight_nonzero", nonzero, n, k, 1), n, k};
}

// The operands of an integer product; `params` points into them.
struct CudaOperands {
  Rows rows;
  std::optional<Tensor> nonzero;
  BinaryWeight weight;
  BinaryMatmulParams params;
};

CudaOperands cuda_operands(const CudaCall& call, const char* op, const Tensor& a, const Tensor& weight, int64_t n,
                           int64_t k, const std::optional<Tensor>& a_nonzero,
                           const std::optional<Tensor>& weight_nonzero, const std::string& levels) {
  const Levels kind = levels_of(op, levels);
  if (n < 0 || k < 0 || k > kMaxColumns)
    fail(op, ": n must be at least 0 and k between 0 and 16777216, got n = ", n, ", k = ", k);
  if (a_nonzero && kind != Levels::sign) fail(op, ": a_nonzero goes with levels=\"sign\" only, got \"", levels, "\"");
  const Rows rows = any_rows_of(op, a);
  call.check("a", a, ScalarType::Int, with_last(rows.leading, word_count(k)));
  CudaOperands o{rows,
                 call.checked("a_nonzero", a_nonzero, ScalarType::Int, sizes_of(a)),
                 cuda_weight(call, weight, weight_nonzero, n, k),
                 {}};
  o.params = o.weight.product(o.rows.m);
  o.params.a = data<int32_t>(o.rows.x);
  o.params.a_nonzero = data_or_null<int32_t>(o.nonzero);
  o.params.operand = operand_of(kind, o.nonzero.has_value());
  return o;
}

Tensor binary_matmul_cuda(Tensor a, Tensor weight, int64_t n, int64_t k, std::optional<Tensor> a_nonzero,
                          std::optional<Tensor> weight_nonzero, std::string levels) {
  const char* op = "binary_matmul";
  const CudaCall call(op, "a", a);
  CudaOperands o = cuda_operands(call, op, a, weight, n, k, a_nonzero, weight_nonzero, levels);
  const Tensor dot = call.new_tensor(with_last(o.rows.leading, n), ScalarType::Int);
  o.params.dot = mutable_data<int32_t>(dot);
  if (o.rows.m > 0 && n > 0) call.require(cuda::launch_binary_matmul(o.params, call.stream()));
  return dot;
}

std::tuple<Tensor, Tensor> binary_matmul_bits_cuda(Tensor a, Tensor weight, Tensor positive,
                                                   std::optional<Tensor> negative, std::optional<Tensor> single,
                                                   int64_t n, int64_t k, std::optional<Tensor> a_nonzero,
                                                   std::optional<Tensor> weight_nonzero, std::string levels) {
  const char* op = "binary_matmul_bits";
  const CudaCall call(op, "a", a);
  CudaOperands o = cuda_operands(call, op, a, weight, n, k, a_nonzero, weight_nonzero, levels);
  if (single && (!negative || single->dim() != 2)) {
    fail(op, ": single must have shape [n, count] and goes with negative, got ", to_string(sizes_of(*single)),
         negative ? "" : " without negative");
  }
  const int64_t single_count = single ? single->size(1) : 0;
  const OutputRanges ranges{call.checked("positive", positive, ScalarType::Int, {2, n}),
                            call.checked("negative", negative, ScalarType::Int, {2, n}),
                            call.checked("single", single, ScalarType::Int, {n, single_count}), n, single_count};
  const Sizes plane = with_last(o.rows.leading, word_count(n));
  const Tensor sign = call.new_tensor(plane, ScalarType::Int);
  const Tensor nonzero = call.new_tensor(negative ? plane : Sizes{0}, ScalarType::Int);
  o.params.bits = ranges.output(mutable_data<int32_t>(sign), mutable_data<int32_t>(nonzero));
  if (o.rows.m > 0 && n > 0) call.require(cuda::launch_binary_matmul(o.params, call.stream()));
  return {sign, nonzero};
}

Tensor binary_matmul_floats_cuda(Tensor a, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                                 std::optional<Tensor> residual, int64_t k, std::optional<Tensor> a_nonzero,
                                 std::optional<Tensor> weight_nonzero, std::string levels) {
  const char* op = "binary_matmul_floats";
  const CudaCall call(op, "a", a);
  const int64_t n = scale.dim() > 0 ? scale.size(0) : 0;
  const Tensor scale_rows = call.checked("scale", scale, ScalarType::Float, {n, 1});
  CudaOperands o = cuda_operands(call, op, a, weight, n, k, a_nonzero, weight_nonzero, levels);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const auto added = call.checked("residual", residual, ScalarType::Float, with_last(o.rows.leading, n));
  const Tensor out = call.new_tensor(with_last(o.rows.leading, n), ScalarType::Float);
  o.params.residual = data_or_null<float>(added);
  o.params.out = out.mutable_data_ptr();
  o.params.scale = data<float>(scale_rows);
  o.params.bias = data_or_null<float>(bias_row);
  call.require(cuda::launch_binary_matmul(o.params, call.stream()));
  return out;
}

Tensor binary_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                          std::optional<Tensor> weight_nonzero, std::optional<Tensor> shift,
                          std::optional<Tensor> alpha, std::string levels, bool row_scale, int64_t group_size,
                          std::string /* the surrogate of the backward */) {
  const char* op = "binary_linear";
  const CudaCall call(op, "x", x);
  const Levels kind = levels_of(op, levels);
  const Rows rows = any_rows_of(op, x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const Tensor scale_rows = call.checked("scale", scale, ScalarType::Float, {n, group_count(op, k, group_size)});
  const BinaryWeight tiles = cuda_weight(call, weight, weight_nonzero, n, k);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const auto step = call.checked("alpha", alpha, ScalarType::Float, {});
  const auto shift_row = call.checked("shift", shift, ScalarType::Float, {k});
  BitpackParams pack = pack_rows(op, rows, shift_row, kind, 0.5);  // of a step of 1
  const Sizes plane = {rows.m, word_count(k)};
  const bool two_planes = kind == Levels::sign;
  const Tensor sign = call.new_tensor(plane, ScalarType::Int);
  const Tensor nonzero = call.new_tensor(two_planes ? plane : Sizes{0}, ScalarType::Int);
  const Tensor mean = call.new_tensor({row_scale ? rows.m : 0}, ScalarType::Float);
  pack.sign = mutable_data<int32_t>(sign);
  pack.nonzero = two_planes ? mutable_data<int32_t>(nonzero) : nullptr;
  pack.mean = row_scale ? mutable_data<float>(mean) : nullptr;
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  BinaryMatmulParams p = tiles.product(rows.m);
  p.a = pack.sign;
  p.a_nonzero = pack.nonzero;
  p.operand = operand_of(kind, two_planes);
  p.out = out.mutable_data_ptr();
  p.out_dtype = pack.dtype;
  p.scale = data<float>(scale_rows);
  p.group_size = group_size;
  p.row_scale = pack.mean;
  p.bias = data_or_null<float>(bias_row);
  call.require(cuda::launch_bitpack(pack, call.stream(), data_or_null<float>(step)));
  call.require(cuda::launch_binary_matmul(p, call.stream()));
  return out;
}

Tensor binary_weight_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias,
                                 std::optional<Tensor> weight_nonzero, int64_t group_size, std::string activations) {
  const char* op = "binary_weight_linear";
  const CudaCall call(op, "x", x);
  call.require_float_activations(activations);
  const Rows rows = any_rows_of(op, x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const Tensor scale_rows = call.checked("scale", scale, ScalarType::Float, {n, group_count(op, k, group_size)});
  const BinaryWeight tiles = cuda_weight(call, weight, weight_nonzero, n, k);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  call.require(
      cuda::launch_binary_weight_matmul(tiles.product(op, rows, scale_rows, group_size, bias_row, out), call.stream()));
  return out;
}

Tensor salient_linear_cuda(Tensor x, Tensor weight, Tensor index, Tensor value, std::optional<Tensor> start,
                           Tensor alpha, std::optional<Tensor> mu, std::optional<Tensor> value_scale,
                           std::optional<Tensor> value_zero, std::optional<Tensor> bias, int64_t group_size,
                           std::string activations, int64_t code_bits) {
  const char* op = "salient_linear";
  const CudaCall call(op, "x", x);
  call.require_float_activations(activations);
  const Rows rows = any_rows_of(op, x);
  SalientArrays arrays = salient_arrays(call, op, weight, index, value, start, alpha, mu, value_scale, value_zero,
                                        rows.k, group_size, code_bits);
  const int64_t n = arrays.view.n;
  const Tensor sign = call.tiles("weight", arrays.weight, n, rows.k, 1);
  arrays.view.sign = data<int32_t>(sign);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  SalientMatmulParams p = arrays.product(op, rows, bias_row);
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  const Tensor signs = call.new_tensor({rows.m, n}, ScalarType::Float);
  const Tensor totals = call.new_tensor({mu ? rows.m : 0, alpha.size(1)}, ScalarType::Float);
  call.require(cuda::launch_salient_matmul(p, mutable_data<float>(signs), mutable_data<float>(totals), call.stream()));
  return out;
}

Tensor zoned_linear_cuda(Tensor x, Tensor sign, Tensor zone, std::optional<Tensor> salient_zone, Tensor salient,
                         Tensor scale, std::optional<Tensor> column_scale, std::optional<Tensor> bias, int64_t n,
                         int64_t block) {
  const char* op = "zoned_linear";
  const CudaCall call(op, "x", x);
  const Rows rows = any_rows_of(op, x);
  const ZonedArrays arrays =
      zoned_arrays(call, op, sign, zone, salient_zone, salient, scale, column_scale, n, rows.k, block);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  ZonedMatmulParams p = arrays.product(op, rows, bias_row);
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  const Tensor places = call.new_tensor({ceil_div(rows.k, block), 2}, ScalarType::Int);
  const Tensor ordered = call.new_tensor({rows.m, rows.k}, column_scale ? ScalarType::Float : x.scalar_type());
  auto* const place = static_cast<cuda::ZonedPlace*>(places.mutable_data_ptr());
  call.require(cuda::launch_zoned_matmul(p, place, ordered.mutable_data_ptr(), call.stream()));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CUDA, m) {
  m.impl("bitpack", BITMILL_BOX(bitmill::bitpack_cuda));
  m.impl("binary_matmul", BITMILL_BOX(bitmill::binary_matmul_cuda));
  m.impl("binary_matmul_bits", BITMILL_BOX(bitmill::binary_matmul_bits_cuda));
  m.impl("binary_matmul_floats", BITMILL_BOX(bitmill::binary_matmul_floats_cuda));
  m.impl("binary_linear", BITMILL_BOX(bitmill::binary_linear_cuda));
  m.impl("binary_weight_linear", BITMILL_BOX(bitmill::binary_weight_linear_cuda));
  m.impl("salient_linear", BITMILL_BOX(bitmill::salient_linear_cuda));
  m.impl("zoned_linear", BITMILL_BOX(bitmill::zoned_linear_cuda));
}

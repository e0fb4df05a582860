// SPDX-License-Identifier: Apache-2.0
// CUDA ops of FP4 weights and activations: check, allocate, launch. Schemas: python/bitmill/ops/fp4_linear.py and
// fp4_activations.py.
#include "boxing.h"
#include "cuda_call.h"
#include "fp4_products.h"

namespace bitmill {
namespace {

// The product of rows of x's dtype with a weight whose tiles the kernels can read; both outlive it.
Fp4MatmulParams product_of(const WeightArguments& arguments, const Tensor& tiles, const Rows& rows, int64_t n,
                           int64_t group_size, Dtype dtype, const std::optional<Tensor>& bias, const Tensor& out) {
  Fp4MatmulParams p;
  p.weight = arguments.weight(n, rows.k, group_size);
  p.weight.tiles = data<int32_t>(tiles);
  p.dtype = dtype;
  p.m = rows.m;
  p.bias = data_or_null<float>(bias);
  p.out = out.mutable_data_ptr();
  return p;
}

Tensor fp4_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                       int64_t group_size, std::optional<Tensor> codebook, std::string activations,
                       std::optional<Tensor> global_scale) {
  const char* op = "fp4_linear";
  const CudaCall call(op, "x", x);
  call.require_float_activations(activations);
  const Rows rows = any_rows_of(op, x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const WeightArguments arguments =
      weight_arguments(call, op, weight, scale, n, k, format, group_size, codebook, global_scale);
  const Tensor tiles = call.tiles("weight", weight, n, k, 4);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  Fp4MatmulParams p = product_of(arguments, tiles, rows, n, group_size, float_dtype(op, rows.x), bias_row, out);
  p.x = rows.x.const_data_ptr();
  if (!codebook) p.weight.table = nullptr;  // that of the format is on the host
  call.require(cuda::launch_fp4_matmul(p, codebook ? nullptr : &arguments.table, call.stream()));
  return out;
}

std::tuple<Tensor, Tensor> cast_activations(const CudaCall& call, ActivationArguments& arguments, const Sizes& sizes,
                                            const Sizes& leading) {
  const Tensor q = call.new_tensor(sizes, ScalarType::Char);
  const Tensor row_scale = call.new_tensor(with_last(leading, arguments.p.groups()), ScalarType::Float);
  arguments.p.q = mutable_data<int8_t>(q);
  arguments.p.row_scale = mutable_data<float>(row_scale);
  call.require(cuda::launch_fp4_activations(arguments.p, call.stream(), data_or_null<float>(arguments.scale)));
  return {q, row_scale};
}

std::tuple<Tensor, Tensor> fp4_activations_cuda(Tensor x, std::string format, std::optional<Tensor> input_scale,
                                                std::optional<Tensor> input_shift, std::string scale_rule) {
  const char* op = "fp4_activations";
  const CudaCall call(op, "x", x);
  const Rows rows = any_rows_of(op, x);
  ActivationArguments arguments(call, op, rows, format, input_scale, input_shift, scale_rule);
  return cast_activations(call, arguments, sizes_of(x), rows.leading);
}

Tensor fp4_fp4_linear_cuda(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                           int64_t group_size, std::optional<Tensor> global_scale, std::string activations,
                           std::optional<Tensor> input_scale, std::optional<Tensor> input_shift,
                           std::string scale_rule) {
  const char* op = "fp4_fp4_linear";
  const CudaCall call(op, "x", x);
  const Rows rows = any_rows_of(op, x);
  ActivationArguments casting(call, op, rows, activations, input_scale, input_shift, scale_rule);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  casting.check_group_size(op, activations, group_size);
  const WeightArguments arguments =
      weight_arguments(call, op, weight, scale, n, k, format, group_size, std::nullopt, global_scale);
  const Tensor tiles = call.tiles("weight", weight, n, k, 4);
  const auto bias_row = call.checked("bias", bias, ScalarType::Float, {n});
  const Fp4Integers integers = checked_integers(op, arguments.table.value, group_size, k);
  const Tensor out = call.new_tensor(with_last(rows.leading, n), x.scalar_type());
  const auto [q, row_scale] = cast_activations(call, casting, {rows.m, k}, {rows.m});
  Fp4MatmulParams p = product_of(arguments, tiles, rows, n, group_size, casting.p.dtype, bias_row, out);
  p.x = q.const_data_ptr();
  p.row_scale = data<float>(row_scale);
  p.grouped_rows = casting.width() > 0;
  call.require(cuda::launch_fp4_int8_matmul(p, integers, call.stream()));
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CUDA, m) {
  m.impl("fp4_linear", BITMILL_BOX(bitmill::fp4_linear_cuda));
  m.impl("fp4_activations", BITMILL_BOX(bitmill::fp4_activations_cuda));
  m.impl("fp4_fp4_linear", BITMILL_BOX(bitmill::fp4_fp4_linear_cuda));
}

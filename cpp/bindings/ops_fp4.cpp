// SPDX-License-Identifier: Apache-2.0
// CPU ops of FP4 weights and activations: check, allocate, call. Schemas: python/bitmill/ops/fp4_linear.py and
// fp4_activations.py.
#include "boxing.h"
#include "checks.h"
#include "fp4_products.h"
#include "int8_rows.h"

namespace bitmill {
namespace {

Tensor fp4_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                      int64_t group_size, std::optional<Tensor> codebook, std::string activations,
                      std::optional<Tensor> global_scale) {
  const char* op = "fp4_linear";
  const CpuCall call(op, "x", x);
  const bool int8 = multiplies_int8(op, activations);
  const Rows rows = rows_of(op, x);
  const Dtype dtype = float_dtype(op, rows.x);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  const WeightArguments arguments =
      weight_arguments(call, op, weight, scale, n, k, format, group_size, codebook, global_scale);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  Fp4MatmulParams p;
  p.weight = arguments.weight(n, k, group_size);
  if (int8) checked_integers(op, p.weight.table, group_size, k);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.dtype = dtype;
  p.m = rows.m;
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  if (int8) {
    require(op, fp4_int8_linear(int8_rows(op, rows), p));
  } else {
    p.x = rows.x.const_data_ptr();
    require(op, fp4_matmul(p));
  }
  return out;
}

// Of a cast of activations: everything else has been checked.
void require_cast(const char* op, const Fp4ActivationsParams& p, Status status) {
  if (status == Status::bad_argument) {
    fail(op, ": input_shift must be at most ", (1 << p.format.exponent_bits) - 1, " for this format, got more");
  }
  require(op, status);
}

std::tuple<Tensor, Tensor> fp4_activations_cpu(Tensor x, std::string format, std::optional<Tensor> input_scale,
                                               std::optional<Tensor> input_shift, std::string scale_rule) {
  const char* op = "fp4_activations";
  const Rows rows = rows_of(op, x);
  ActivationArguments arguments(CpuCall(op, "x", x), op, rows, format, input_scale, input_shift, scale_rule);
  const Tensor q = new_tensor(sizes_of(x), ScalarType::Char);
  const Tensor row_scale = new_tensor(with_last(rows.leading, arguments.p.groups()), ScalarType::Float);
  Fp4ActivationsParams& p = arguments.p;
  if (arguments.scale) p.scale = *data<float>(*arguments.scale);
  p.q = mutable_data<int8_t>(q);
  p.row_scale = mutable_data<float>(row_scale);
  require_cast(op, p, fp4_activations(p));
  return {q, row_scale};
}

Tensor fp4_fp4_linear_cpu(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias, std::string format,
                          int64_t group_size, std::optional<Tensor> global_scale, std::string activations,
                          std::optional<Tensor> input_scale, std::optional<Tensor> input_shift,
                          std::string scale_rule) {
  const char* op = "fp4_fp4_linear";
  const Rows rows = rows_of(op, x);
  const CpuCall call(op, "x", x);
  ActivationArguments casting(call, op, rows, activations, input_scale, input_shift, scale_rule);
  const int64_t k = rows.k, n = scale.dim() > 0 ? scale.size(0) : 0;
  casting.check_group_size(op, activations, group_size);
  const WeightArguments arguments =
      weight_arguments(call, op, weight, scale, n, k, format, group_size, std::nullopt, global_scale);
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  Fp4MatmulParams p;
  p.weight = arguments.weight(n, k, group_size);
  checked_integers(op, p.weight.table, group_size, k);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  if (casting.scale) casting.p.scale = *data<float>(*casting.scale);
  p.dtype = casting.p.dtype;
  p.m = rows.m;
  p.grouped_rows = casting.width() > 0;
  p.bias = data_or_null<float>(bias_row);
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require_cast(op, casting.p, fp4_fp4_linear(casting.p, p));
  return out;
}

Tensor fp4_weight_cpu(Tensor weight, Tensor scale, int64_t n, int64_t k, std::string format, int64_t group_size,
                      std::optional<Tensor> codebook, std::optional<Tensor> global_scale) {
  const char* op = "fp4_weight";
  const CpuCall call(op, "weight", weight);
  if (n < 0 || k < 0 || k > kMaxColumns)
    fail(op, ": n must be at least 0 and k between 0 and 16777216, got n = ", n, ", k = ", k);
  const WeightArguments arguments =
      weight_arguments(call, op, weight, scale, n, k, format, group_size, codebook, global_scale);
  const Tensor values = new_tensor({n, k}, ScalarType::Float);
  require(op, fp4_weight(arguments.weight(n, k, group_size), mutable_data<float>(values), torch_parallel_for));
  return values;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("fp4_linear", BITMILL_BOX(bitmill::fp4_linear_cpu));
  m.impl("fp4_weight", BITMILL_BOX(bitmill::fp4_weight_cpu));
  m.impl("fp4_activations", BITMILL_BOX(bitmill::fp4_activations_cpu));
  m.impl("fp4_fp4_linear", BITMILL_BOX(bitmill::fp4_fp4_linear_cpu));
}

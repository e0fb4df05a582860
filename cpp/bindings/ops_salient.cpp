// SPDX-License-Identifier: Apache-2.0
// CPU ops of the salient_scatter family: check, allocate, call. Schemas:
// python/bitmill/ops/salient_scatter.py.
#include "checks.h"
#include "salient_scatter.h"

namespace bitmill {
namespace {

// The arrays of a weight, checked and made contiguous; `view` points into them.
struct SalientArrays {
  Tensor weight, mask, value, start, alpha;
  std::optional<Tensor> mu, value_scale, value_zero;
  SalientWeight view;
};

SalientArrays salient_arrays(const char* op, const Tensor& weight, const Tensor& mask, const Tensor& value,
                             const Tensor& start, const Tensor& alpha, const std::optional<Tensor>& mu,
                             const std::optional<Tensor>& value_scale, const std::optional<Tensor>& value_zero,
                             int64_t k, int64_t group_size) {
  const int64_t n = alpha.dim() > 0 ? alpha.size(0) : 0;
  const Sizes scales = {n, group_count(op, k, group_size)};
  const Sizes tiles = tile_sizes(n, k);
  const ScalarType kind = value.scalar_type();
  if (kind != ScalarType::Byte && kind != ScalarType::Half) {
    fail(op, ": value must be uint8 or float16, got ", dtype_name(kind));
  }
  if (value.dim() != 1) fail(op, ": value must have shape [entries], got ", to_string(sizes_of(value)));
  const bool codes = kind == ScalarType::Byte;
  if (codes != value_scale.has_value() || codes != value_zero.has_value()) {
    fail(op, ": value_scale and value_zero must be given for uint8 value and only then, got ", dtype_name(kind),
         " value");
  }
  const char* remedy = "; pack the weight with bitmill.ops.tile_pack";
  SalientArrays a{checked(op, "weight", weight, ScalarType::Int, tiles, remedy),
                  checked(op, "mask", mask, ScalarType::Int, tiles, remedy),
                  checked(op, "value", value, kind, sizes_of(value)),
                  checked(op, "start", start, ScalarType::Int, {n + 1}),
                  checked(op, "alpha", alpha, ScalarType::Float, scales),
                  checked(op, "mu", mu, ScalarType::Float, scales),
                  checked(op, "value_scale", value_scale, ScalarType::Float, {n}),
                  checked(op, "value_zero", value_zero, ScalarType::Float, {n}),
                  {}};
  a.view.sign = data<int32_t>(a.weight);
  a.view.mask = data<int32_t>(a.mask);
  a.view.value = a.value.const_data_ptr();
  a.view.start = data<int32_t>(a.start);
  a.view.value_scale = data_or_null<float>(a.value_scale);
  a.view.value_zero = data_or_null<float>(a.value_zero);
  a.view.alpha = data<float>(a.alpha);
  a.view.mu = data_or_null<float>(a.mu);
  a.view.n = n;
  a.view.k = k;
  a.view.entries = a.value.size(0);
  a.view.group_size = group_size;
  return a;
}

Tensor salient_linear_cpu(Tensor x, Tensor weight, Tensor mask, Tensor value, Tensor start, Tensor alpha,
                          std::optional<Tensor> mu, std::optional<Tensor> value_scale, std::optional<Tensor> value_zero,
                          std::optional<Tensor> bias, int64_t group_size) {
  const char* op = "salient_linear";
  const Rows rows = rows_of(op, x);
  const SalientArrays arrays =
      salient_arrays(op, weight, mask, value, start, alpha, mu, value_scale, value_zero, rows.k, group_size);
  const int64_t n = arrays.view.n;
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  SalientMatmulParams p;
  p.weight = arrays.view;
  p.x = rows.x.const_data_ptr();
  p.dtype = float_dtype(op, rows.x);
  p.m = rows.m;
  p.bias = data_or_null<float>(bias_row);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, salient_matmul(p));
  return out;
}

Tensor salient_weight_cpu(Tensor weight, Tensor mask, Tensor value, Tensor start, Tensor alpha,
                          std::optional<Tensor> mu, std::optional<Tensor> value_scale, std::optional<Tensor> value_zero,
                          int64_t k, int64_t group_size) {
  const char* op = "salient_weight";
  if (k < 0 || k > kMaxColumns) fail(op, ": k must be in [0, ", kMaxColumns, "], got ", k);
  const SalientArrays arrays =
      salient_arrays(op, weight, mask, value, start, alpha, mu, value_scale, value_zero, k, group_size);
  const Tensor dense = new_tensor({arrays.view.n, k}, ScalarType::Float);
  require(op, salient_dequantize(arrays.view, mutable_data<float>(dense), torch_parallel_for));
  return dense;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("salient_linear", TORCH_BOX(&bitmill::salient_linear_cpu));
  m.impl("salient_weight", TORCH_BOX(&bitmill::salient_weight_cpu));
}

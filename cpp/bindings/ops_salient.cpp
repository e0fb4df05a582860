// SPDX-License-Identifier: Apache-2.0
// CPU ops of the salient_scatter family: check, allocate, call. Schemas:
// python/bitmill/ops/salient_scatter.py.
#include "boxing.h"
#include "checks.h"
#include "int8_rows.h"
#include "salient_arguments.h"

namespace bitmill {
namespace {

Tensor salient_linear_cpu(Tensor x, Tensor weight, Tensor index, Tensor value, std::optional<Tensor> start,
                          Tensor alpha, std::optional<Tensor> mu, std::optional<Tensor> value_scale,
                          std::optional<Tensor> value_zero, std::optional<Tensor> bias, int64_t group_size,
                          std::string activations, int64_t code_bits) {
  const char* op = "salient_linear";
  const Rows rows = rows_of(op, x);
  const SalientArrays arrays = salient_arrays(CpuCall(op, "x", x), op, weight, index, value, start, alpha, mu,
                                              value_scale, value_zero, rows.k, group_size, code_bits);
  const int64_t n = arrays.view.n;
  const auto bias_row = checked(op, "bias", bias, ScalarType::Float, {n});
  SalientMatmulParams p = arrays.product(op, rows, bias_row);
  p.int8 = multiplies_int8(op, activations);
  const Tensor out = new_tensor(with_last(rows.leading, n), x.scalar_type());
  p.out = out.mutable_data_ptr();
  p.parallel_for = torch_parallel_for;
  require(op, salient_matmul(p));
  return out;
}

Tensor salient_weight_cpu(Tensor weight, Tensor index, Tensor value, std::optional<Tensor> start, Tensor alpha,
                          std::optional<Tensor> mu, std::optional<Tensor> value_scale, std::optional<Tensor> value_zero,
                          int64_t k, int64_t group_size, int64_t code_bits) {
  const char* op = "salient_weight";
  if (k < 0 || k > kMaxColumns) fail(op, ": k must be in [0, ", kMaxColumns, "], got ", k);
  const SalientArrays arrays = salient_arrays(CpuCall(op, "weight", weight), op, weight, index, value, start, alpha, mu,
                                              value_scale, value_zero, k, group_size, code_bits);
  const Tensor dense = new_tensor({arrays.view.n, k}, ScalarType::Float);
  require(op, salient_dequantize(arrays.view, mutable_data<float>(dense), torch_parallel_for));
  return dense;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("salient_linear", BITMILL_BOX(bitmill::salient_linear_cpu));
  m.impl("salient_weight", BITMILL_BOX(bitmill::salient_weight_cpu));
}

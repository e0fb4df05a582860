// SPDX-License-Identifier: Apache-2.0
// The CPU ops of whole blocks, floats in and floats out with bits between: check, allocate, call. Schemas:
// python/bitmill/ops/binary_blocks.py, binary_encoder_layer.py and layer_norm.py.
#include "blocks.h"
#include "boxing.h"
#include "torch_layer_norm.h"

namespace bitmill {
namespace {

// Its result as the op's own, with the residual that the caller gives.
struct LastResult {
  std::optional<Tensor> residual;
  Tensor out;

  LastResult(const char* op, const Rows& rows, const LastLayer& last, const std::optional<Tensor>& added)
      : residual(checked(op, "residual", added, ScalarType::Float, with_last(rows.leading, last.weight.n))),
        out(new_tensor(with_last(rows.leading, last.weight.n), ScalarType::Float)) {}

  BinaryMatmulParams of(const LastLayer& last, const PackedRows& packed, int64_t m) const {
    return last.product(packed, m, data_or_null<float>(residual), mutable_data<float>(out));
  }
};

Tensor binary_mlp_cpu(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> shift, double threshold,
                      std::string levels, Tensor up, std::optional<Tensor> up_nonzero, Tensor positive,
                      std::optional<Tensor> negative, std::optional<Tensor> single, std::string inner_levels,
                      Tensor down, std::optional<Tensor> down_nonzero, Tensor scale, std::optional<Tensor> bias) {
  const char* op = "binary_mlp";
  const Rows rows = float_rows(op, x);
  const Mlp mlp(op, rows.m, rows.k,
                {shift, threshold, levels, up, up_nonzero, positive, negative, single, inner_levels, down, down_nonzero,
                 scale, bias});
  const LastResult result(op, rows, mlp.last, residual);
  std::vector<RowStep> steps;
  mlp.add_steps(steps, data<float>(rows.x), rows.m);
  steps.emplace_back(result.of(mlp.last, mlp.between, rows.m));
  require(op, row_steps(steps));
  return result.out;
}

Tensor binary_self_attention_cpu(Tensor x, std::optional<Tensor> residual, std::vector<Tensor> shift,
                                 std::vector<double> threshold, std::string levels, std::vector<Tensor> weight,
                                 std::vector<Tensor> weight_nonzero, Tensor positive, std::optional<Tensor> negative,
                                 std::optional<Tensor> single, std::optional<Tensor> mask,
                                 std::optional<Tensor> lengths, int64_t heads, std::string rule,
                                 std::optional<double> scaling, double beta, std::optional<Tensor> alpha_q,
                                 std::optional<Tensor> alpha_k, std::optional<Tensor> alpha_a, Tensor context_positive,
                                 std::optional<Tensor> context_negative, std::string out_levels, Tensor out,
                                 std::optional<Tensor> out_nonzero, Tensor scale, std::optional<Tensor> bias) {
  const char* op = "binary_self_attention";
  const SelfAttentionArguments arguments{shift,
                                         threshold,
                                         levels,
                                         weight,
                                         weight_nonzero,
                                         positive,
                                         negative,
                                         single,
                                         mask,
                                         lengths,
                                         heads,
                                         rule,
                                         scaling,
                                         beta,
                                         alpha_q,
                                         alpha_k,
                                         alpha_a,
                                         context_positive,
                                         context_negative,
                                         out_levels,
                                         out,
                                         out_nonzero,
                                         scale,
                                         bias};
  SelfAttention attention(op, x, arguments);
  const LastResult result(op, attention.rows, attention.last, residual);
  const PackedRows context = attention.run(op, data<float>(attention.rows.x));
  require(op, binary_matmul(result.of(attention.last, context, attention.rows.m)));
  return result.out;
}

Tensor binary_encoder_layer_cpu(
    Tensor x, std::vector<Tensor> shift, std::vector<double> threshold, std::string levels, std::vector<Tensor> weight,
    std::vector<Tensor> weight_nonzero, Tensor positive, std::optional<Tensor> negative, std::optional<Tensor> single,
    std::optional<Tensor> mask, std::optional<Tensor> lengths, int64_t heads, std::string rule,
    std::optional<double> scaling, double beta, std::optional<Tensor> alpha_q, std::optional<Tensor> alpha_k,
    std::optional<Tensor> alpha_a, Tensor context_positive, std::optional<Tensor> context_negative,
    std::string out_levels, Tensor out, std::optional<Tensor> out_nonzero, Tensor scale, std::optional<Tensor> bias,
    Tensor norm_weight, Tensor norm_bias, double norm_eps, std::optional<Tensor> mlp_shift, double mlp_threshold,
    std::string mlp_levels, Tensor up, std::optional<Tensor> up_nonzero, Tensor mlp_positive,
    std::optional<Tensor> mlp_negative, std::optional<Tensor> mlp_single, std::string inner_levels, Tensor down,
    std::optional<Tensor> down_nonzero, Tensor mlp_scale, std::optional<Tensor> mlp_bias, Tensor last_norm_weight,
    Tensor last_norm_bias, double last_norm_eps, bool norm_first) {
  const char* op = "binary_encoder_layer";
  const SelfAttentionArguments arguments{shift,
                                         threshold,
                                         levels,
                                         weight,
                                         weight_nonzero,
                                         positive,
                                         negative,
                                         single,
                                         mask,
                                         lengths,
                                         heads,
                                         rule,
                                         scaling,
                                         beta,
                                         alpha_q,
                                         alpha_k,
                                         alpha_a,
                                         context_positive,
                                         context_negative,
                                         out_levels,
                                         out,
                                         out_nonzero,
                                         scale,
                                         bias};
  SelfAttention attention(op, x, arguments);
  const int64_t m = attention.rows.m, n = attention.rows.k;
  const Mlp mlp(op, m, n,
                {mlp_shift, mlp_threshold, mlp_levels, up, up_nonzero, mlp_positive, mlp_negative, mlp_single,
                 inner_levels, down, down_nonzero, mlp_scale, mlp_bias},
                "mlp_");
  const auto check_width = [&](const char* name, const LastLayer& last) {
    if (last.weight.n == n) return;
    fail(op, ": ", name, " must have as many rows as x has columns, ", n, ", got ", last.weight.n);
  };
  check_width("scale", attention.last);
  check_width("mlp_scale", mlp.last);
  const Norm norm(op, "norm_", norm_weight, norm_bias, norm_eps, n);
  const Norm last_norm(op, "last_norm_", last_norm_weight, last_norm_bias, last_norm_eps, n);
  const Tensor result = new_tensor(sizes_of(x), ScalarType::Float);
  const auto attended = scratch<float>(m * n), normalised = scratch<float>(norm_first ? m * n : 0);
  const float* input = data<float>(attention.rows.x);
  float* last = mutable_data<float>(result);

  std::optional<LayerNormParams> before;
  if (norm_first) before = norm.of(input, normalised.get(), m);
  const PackedRows context = attention.run(op, input, before);
  std::vector<RowStep> steps = {attention.last.product(context, m, input, attended.get())};
  const LayerNormParams between =
      norm_first ? last_norm.of(attended.get(), normalised.get(), m) : norm.of(attended.get(), attended.get(), m);
  steps.emplace_back(between);
  mlp.add_steps(steps, between.out, m);
  steps.emplace_back(mlp.last.product(mlp.between, m, attended.get(), last));
  if (!norm_first) steps.emplace_back(last_norm.of(last, last, m));
  run_with_layer_norm(op, steps);
  return result;
}

Tensor layer_norm_cpu(Tensor x, Tensor weight, Tensor bias, double eps) {
  const char* op = "layer_norm";
  const Rows rows = float_rows(op, x);
  const Norm norm(op, "", weight, bias, eps, rows.k);
  const Tensor out = new_tensor(sizes_of(x), ScalarType::Float);
  const RowStep step = norm.of(data<float>(rows.x), mutable_data<float>(out), rows.m);
  run_with_layer_norm(op, {&step, 1});
  return out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("binary_encoder_layer", BITMILL_BOX(bitmill::binary_encoder_layer_cpu));
  m.impl("binary_mlp", BITMILL_BOX(bitmill::binary_mlp_cpu));
  m.impl("binary_self_attention", BITMILL_BOX(bitmill::binary_self_attention_cpu));
  m.impl("layer_norm", BITMILL_BOX(bitmill::layer_norm_cpu));
}

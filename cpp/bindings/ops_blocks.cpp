// SPDX-License-Identifier: Apache-2.0
// The CPU ops of whole blocks, floats in and floats out with bits between: check, allocate, call. Schemas:
// python/bitmill/ops/binary_blocks.py, binary_encoder.py and layer_norm.py.
#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

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
};

Tensor binary_mlp_cpu(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> shift, double threshold,
                      std::string levels, Tensor up, std::optional<Tensor> up_nonzero, Tensor positive,
                      std::optional<Tensor> negative, std::optional<Tensor> single, std::string inner_levels,
                      Tensor down, std::optional<Tensor> down_nonzero, Tensor scale, std::optional<Tensor> bias) {
  const char* op = "binary_mlp";
  const Rows rows = float_rows(op, x);
  const Mlp mlp(op, rows.k,
                {shift, threshold, levels, up, up_nonzero, positive, negative, single, inner_levels, down, down_nonzero,
                 scale, bias});
  const LastResult result(op, rows, mlp.last, residual);
  const Mlp::Scratch scratch(mlp, rows.m);
  std::vector<RowStep> steps;
  mlp.add_steps(steps, data<float>(rows.x), rows.m, data_or_null<float>(result.residual),
                mutable_data<float>(result.out), scratch);
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
  const Rows rows = attention_rows(op, x, lengths.has_value());
  SelfAttention attention(op, rows,
                          {shift,
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
                           bias});
  const LastResult result(op, rows, attention.last, residual);
  const SelfAttention::Scratch scratch(attention);
  std::vector<RowStep> steps;
  attention.add_projections(steps, data<float>(rows.x), scratch);
  require(op, row_steps(steps));
  const PackedRows context = attention.attend(op, scratch);
  require(op, binary_matmul(attention.last.product(context, rows.m, data_or_null<float>(result.residual),
                                                   mutable_data<float>(result.out))));
  return result.out;
}

struct EncoderLayer {
  SelfAttention attention;
  Norm norm;
  Mlp mlp;
  Norm last_norm;

  EncoderLayer(const char* op, const Rows& rows, SelfAttentionArguments of_attention, const Tensor& norm_weight,
               const Tensor& norm_bias, double norm_eps, const MlpArguments& of_mlp, const Tensor& last_norm_weight,
               const Tensor& last_norm_bias, double last_norm_eps)
      : attention(op, rows, std::move(of_attention)),
        norm(op, "norm_", norm_weight, norm_bias, norm_eps, rows.k),
        mlp(op, rows.k, of_mlp, "mlp_"),
        last_norm(op, "last_norm_", last_norm_weight, last_norm_bias, last_norm_eps, rows.k) {
    check_width(op, "scale", attention.last, rows.k);
    check_width(op, "mlp_scale", mlp.last, rows.k);
  }

 private:
  static void check_width(const char* op, const char* name, const LastLayer& last, int64_t k) {
    if (last.weight.n == k) return;
    fail(op, ": ", name, " must have as many rows as x has columns, ", k, ", got ", last.weight.n);
  }
};

// The projections of a layer's attention, of its normalised input where that is not x itself.
void add_projections(std::vector<RowStep>& steps, const EncoderLayer& layer, const float* x, float* normalised,
                     const SelfAttention::Scratch& scratch) {
  const int64_t m = layer.attention.m;
  if (normalised) steps.emplace_back(layer.norm.of(x, normalised, m));
  layer.attention.add_projections(steps, normalised ? normalised : x, scratch);
}

void run_encoder(const char* op, std::vector<EncoderLayer>& layers, const Rows& rows, float* out, bool norm_first) {
  const int64_t m = rows.m;
  const auto attended = scratch<float>(m * rows.k), normalised = scratch<float>(norm_first ? m * rows.k : 0);
  float* before = norm_first ? normalised.get() : nullptr;
  const float* x = data<float>(rows.x);
  std::vector<RowStep> steps;
  auto heads = std::make_unique<SelfAttention::Scratch>(layers[0].attention);
  add_projections(steps, layers[0], x, before, *heads);
  run_with_layer_norm(op, steps);
  for (size_t i = 0; i < layers.size(); ++i) {
    EncoderLayer& layer = layers[i];
    const PackedRows context = layer.attention.attend(op, *heads);
    const Mlp::Scratch between(layer.mlp, m);
    const LayerNormParams norm = norm_first ? layer.last_norm.of(attended.get(), normalised.get(), m)
                                            : layer.norm.of(attended.get(), attended.get(), m);
    steps.assign({layer.attention.last.product(context, m, x, attended.get()), norm});
    layer.mlp.add_steps(steps, norm.out, m, attended.get(), out, between);
    if (!norm_first) steps.emplace_back(layer.last_norm.of(out, out, m));
    if (i + 1 < layers.size()) {
      heads = std::make_unique<SelfAttention::Scratch>(layers[i + 1].attention);
      add_projections(steps, layers[i + 1], out, before, *heads);
    }
    run_with_layer_norm(op, steps);
    x = out;
  }
}

// The entries of a layer in a list that has one for each projection.
template <class T>
std::vector<T> entries_of(const std::vector<T>& list, size_t layer, size_t projections) {
  if (list.empty()) return {};
  const auto first = list.begin() + static_cast<std::ptrdiff_t>(layer * projections);
  return {first, first + static_cast<std::ptrdiff_t>(projections)};
}

Tensor binary_encoder_cpu(Tensor x, std::vector<Tensor> shift, std::vector<double> threshold, std::string levels,
                          std::vector<Tensor> weight, std::vector<Tensor> weight_nonzero, std::vector<Tensor> positive,
                          std::vector<Tensor> negative, std::vector<Tensor> single, std::optional<Tensor> mask,
                          std::optional<Tensor> lengths, int64_t heads, std::string rule, std::optional<double> scaling,
                          double beta, std::vector<Tensor> alpha_q, std::vector<Tensor> alpha_k,
                          std::vector<Tensor> alpha_a, std::vector<Tensor> context_positive,
                          std::vector<Tensor> context_negative, std::string out_levels, std::vector<Tensor> out,
                          std::vector<Tensor> out_nonzero, std::vector<Tensor> scale, std::vector<Tensor> bias,
                          std::vector<Tensor> norm_weight, std::vector<Tensor> norm_bias, std::vector<double> norm_eps,
                          std::vector<Tensor> mlp_shift, std::vector<double> mlp_threshold, std::string mlp_levels,
                          std::vector<Tensor> up, std::vector<Tensor> up_nonzero, std::vector<Tensor> mlp_positive,
                          std::vector<Tensor> mlp_negative, std::vector<Tensor> mlp_single, std::string inner_levels,
                          std::vector<Tensor> down, std::vector<Tensor> down_nonzero, std::vector<Tensor> mlp_scale,
                          std::vector<Tensor> mlp_bias, std::vector<Tensor> last_norm_weight,
                          std::vector<Tensor> last_norm_bias, std::vector<double> last_norm_eps, bool norm_first) {
  const char* op = "binary_encoder";
  const size_t count = positive.size(), weights = weight.size();
  if (count == 0 || (weights != count && weights != 3 * count)) {
    fail(op, ": weight must hold one or three entries for each of the ", count, " layers, got ", weights);
  }
  const size_t projections = weights / count;
  struct Count {
    const char* name;
    size_t got, expected;
    bool optional = false;
  };
  for (const Count& list : std::initializer_list<Count>{
           {"shift", shift.size(), weights, true},
           {"threshold", threshold.size(), weights},
           {"weight_nonzero", weight_nonzero.size(), weights, true},
           {"negative", negative.size(), count, true},
           {"single", single.size(), count, true},
           {"alpha_q", alpha_q.size(), count, true},
           {"alpha_k", alpha_k.size(), count, true},
           {"alpha_a", alpha_a.size(), count, true},
           {"context_positive", context_positive.size(), count},
           {"context_negative", context_negative.size(), count, true},
           {"out", out.size(), count},
           {"out_nonzero", out_nonzero.size(), count, true},
           {"scale", scale.size(), count},
           {"bias", bias.size(), count, true},
           {"norm_weight", norm_weight.size(), count},
           {"norm_bias", norm_bias.size(), count},
           {"norm_eps", norm_eps.size(), count},
           {"mlp_shift", mlp_shift.size(), count, true},
           {"mlp_threshold", mlp_threshold.size(), count},
           {"up", up.size(), count},
           {"up_nonzero", up_nonzero.size(), count, true},
           {"mlp_positive", mlp_positive.size(), count},
           {"mlp_negative", mlp_negative.size(), count, true},
           {"mlp_single", mlp_single.size(), count, true},
           {"down", down.size(), count},
           {"down_nonzero", down_nonzero.size(), count, true},
           {"mlp_scale", mlp_scale.size(), count},
           {"mlp_bias", mlp_bias.size(), count, true},
           {"last_norm_weight", last_norm_weight.size(), count},
           {"last_norm_bias", last_norm_bias.size(), count},
           {"last_norm_eps", last_norm_eps.size(), count},
       }) {
    if (list.got == list.expected || (list.got == 0 && list.optional)) continue;
    fail(op, ": ", list.name, " must hold ", list.expected, " entries", list.optional ? " or none" : "", ", got ",
         list.got);
  }
  std::vector<EncoderLayer> layers;
  layers.reserve(count);
  std::optional<Rows> rows;
  for (size_t i = 0; i < count; ++i) {
    const std::string named = std::string(op) + ": layer " + std::to_string(i);
    if (!rows) rows = attention_rows(named.c_str(), x, lengths.has_value());
    std::vector<Tensor> shifts = entries_of(shift, i, projections);
    if (std::all_of(shifts.begin(), shifts.end(), [](const Tensor& t) { return t.numel() == 0; })) shifts.clear();
    layers.emplace_back(
        named.c_str(), *rows,
        SelfAttentionArguments{shifts,
                               entries_of(threshold, i, projections),
                               levels,
                               entries_of(weight, i, projections),
                               entries_of(weight_nonzero, i, projections),
                               positive[i],
                               entry_of(negative, i),
                               entry_of(single, i),
                               mask,
                               lengths,
                               heads,
                               rule,
                               scaling,
                               beta,
                               entry_of(alpha_q, i),
                               entry_of(alpha_k, i),
                               entry_of(alpha_a, i),
                               context_positive[i],
                               entry_of(context_negative, i),
                               out_levels,
                               out[i],
                               entry_of(out_nonzero, i),
                               scale[i],
                               entry_of(bias, i)},
        norm_weight[i], norm_bias[i], norm_eps[i],
        MlpArguments{entry_of(mlp_shift, i), mlp_threshold[i], mlp_levels, up[i], entry_of(up_nonzero, i),
                     mlp_positive[i], entry_of(mlp_negative, i), entry_of(mlp_single, i), inner_levels, down[i],
                     entry_of(down_nonzero, i), mlp_scale[i], entry_of(mlp_bias, i)},
        last_norm_weight[i], last_norm_bias[i], last_norm_eps[i]);
  }
  const Tensor result = new_tensor(sizes_of(x), ScalarType::Float);
  run_encoder(op, layers, *rows, mutable_data<float>(result), norm_first);
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
  m.impl("binary_encoder", BITMILL_BOX(bitmill::binary_encoder_cpu));
  m.impl("binary_mlp", BITMILL_BOX(bitmill::binary_mlp_cpu));
  m.impl("binary_self_attention", BITMILL_BOX(bitmill::binary_self_attention_cpu));
  m.impl("layer_norm", BITMILL_BOX(bitmill::layer_norm_cpu));
}

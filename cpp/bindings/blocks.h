// SPDX-License-Identifier: Apache-2.0
// The parts of the ops of whole blocks: what they take, checked, and what they compute as steps of rows (row_steps.h).
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention_checks.h"
#include "bit_checks.h"
#include "row_steps.h"
#include "torch_layer_norm.h"

namespace bitmill {

// Packed rows between two products.
struct PackedRows {
  std::unique_ptr<int32_t[]> sign, nonzero;  // nonzero is null where nothing is 0

  PackedRows(int64_t words, bool zeros)
      : sign(scratch<int32_t>(words)), nonzero(zeros ? scratch<int32_t>(words) : nullptr) {}

  void read_by(BinaryMatmulParams& product, Levels levels) const {
    product.a = sign.get();
    product.a_nonzero = nonzero.get();
    product.operand = operand_of(levels, nonzero != nullptr);
  }
};

// The layer at the end of a block: floats, and a residual added to them.
struct LastLayer {
  BinaryWeight weight;
  Levels levels;
  Tensor scale;
  std::optional<Tensor> bias;

  LastLayer(const char* op, int64_t k, const std::string& name, const Tensor& tiles,
            const std::optional<Tensor>& nonzero, const Tensor& scales, const std::optional<Tensor>& biases,
            const std::string& levels_name, const std::string& prefix = "")
      : weight(binary_weight(op, tiles, nonzero, scales.dim() > 0 ? scales.size(0) : 0, k, name)),
        levels(levels_of(op, levels_name)),
        scale(checked(op, (prefix + "scale").c_str(), scales, ScalarType::Float, {weight.n, 1})),
        bias(checked(op, (prefix + "bias").c_str(), biases, ScalarType::Float, {weight.n})) {}

  BinaryMatmulParams product(const PackedRows& rows, int64_t m, const float* residual, float* out) const {
    BinaryMatmulParams p = weight.product(m);
    rows.read_by(p, levels);
    p.scale = data<float>(scale);
    p.bias = data_or_null<float>(bias);
    p.residual = residual;
    p.out = out;
    return p;
  }
};

inline Rows float_rows(const char* op, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) fail(op, ": x must be float32, got ", dtype_name(x.scalar_type()));
  return rows_of(op, x);
}

// Packs rows of floats; `packed` gets them.
inline BitpackParams packing(const float* x, int64_t m, int64_t k, const std::optional<Tensor>& shift, Levels levels,
                             float threshold, const PackedRows& packed) {
  BitpackParams p;
  p.x = x;
  p.m = m;
  p.k = p.row_stride = k;
  p.shift = data_or_null<float>(shift);
  p.threshold = threshold;
  p.levels = levels;
  p.sign = packed.sign.get();
  p.nonzero = packed.nonzero.get();
  p.parallel_for = torch_parallel_for;
  return p;
}

// What the ops of an MLP take, in the order of their schemas.
struct MlpArguments {
  std::optional<Tensor> shift;
  double threshold;
  std::string levels;
  Tensor up;
  std::optional<Tensor> up_nonzero;
  Tensor positive;
  std::optional<Tensor> negative, single;
  std::string inner_levels;
  Tensor down;
  std::optional<Tensor> down_nonzero;
  Tensor scale;
  std::optional<Tensor> bias;
};

// down(f(up(x))) of rows of floats, as steps.
struct Mlp {
  Levels levels;
  std::optional<Tensor> shift;
  float threshold;
  int64_t inner;
  BinaryWeight first;
  OutputRanges ranges;
  LastLayer last;
  PackedRows packed, between;

  // `prefix` stands before the names that an attention's arguments have too.
  Mlp(const char* op, int64_t m, int64_t k, const MlpArguments& a, const std::string& prefix = "")
      : levels(levels_of(op, a.levels)),
        shift(checked(op, (prefix + "shift").c_str(), a.shift, ScalarType::Float, {k})),
        threshold(static_cast<float>(a.threshold)),
        inner(a.positive.dim() > 0 ? a.positive.size(a.positive.dim() - 1) : 0),
        first(binary_weight(op, a.up, a.up_nonzero, inner, k, "up")),
        ranges(output_ranges(op, a.positive, a.negative, a.single, {}, inner, prefix)),
        last(op, inner, "down", a.down, a.down_nonzero, a.scale, a.bias, a.inner_levels, prefix),
        packed(m * word_count(k), levels == Levels::sign),
        between(m * word_count(inner), a.negative.has_value()) {}

  // Packing and the first product; `last` reads `between`.
  void add_steps(std::vector<RowStep>& steps, const float* x, int64_t m) const {
    BinaryMatmulParams up = first.product(m);
    packed.read_by(up, levels);
    up.bits = ranges.output(between.sign.get(), between.nonzero.get());
    steps.emplace_back(packing(x, m, first.k, shift, levels, threshold, packed));
    steps.emplace_back(up);
  }
};

// What the ops of an attention take, in the order of their schemas.
struct SelfAttentionArguments {
  std::vector<Tensor> shift;
  std::vector<double> threshold;
  std::string levels;
  std::vector<Tensor> weight, weight_nonzero;
  Tensor positive;
  std::optional<Tensor> negative, single, mask, lengths;
  int64_t heads;
  std::string rule;
  std::optional<double> scaling;
  double beta;
  std::optional<Tensor> alpha_q, alpha_k, alpha_a;
  Tensor context_positive;
  std::optional<Tensor> context_negative;
  std::string out_levels;
  Tensor out;
  std::optional<Tensor> out_nonzero;
  Tensor scale;
  std::optional<Tensor> bias;
};

// attention(query(x), key(x), value(x)), as the packed input of the output projection.
struct SelfAttention {
  const SelfAttentionArguments& a;
  Rows rows;
  Levels levels;
  int64_t layers, columns, width;  // columns: of a layer; width: of queries, keys and values each
  std::vector<BinaryWeight> weights;
  std::vector<std::optional<Tensor>> shifts;
  OutputRanges ranges, context_ranges;
  LastLayer last;
  BinaryAttentionParams p;
  std::vector<int64_t> first;
  std::optional<MaskView> attended;

  SelfAttention(const char* op, const Tensor& x, const SelfAttentionArguments& arguments);
  // Of rows of floats x [m, k]; with `before`, of its results.
  PackedRows run(const char* op, const float* x, const std::optional<LayerNormParams>& before = {});

 private:
  bool one_input() const {
    const auto same = [&](double each) { return each == a.threshold[0]; };
    return a.shift.empty() && std::all_of(a.threshold.begin(), a.threshold.end(), same);
  }
};

inline Rows attention_rows(const char* op, const Tensor& x, const SelfAttentionArguments& a) {
  if (a.heads < 1) fail(op, ": heads must be at least 1, got ", a.heads);
  if (a.lengths && a.mask) fail(op, ": mask and lengths exclude each other, got both");
  if (x.dim() != (a.lengths ? 2 : 3)) {
    fail(op, ": x must have shape ", a.lengths ? "[rows, k] with lengths" : "[sequences, n, k]", ", got ",
         to_string(sizes_of(x)));
  }
  return float_rows(op, x);
}

// How many columns a layer has.
inline int64_t projected_columns(const char* op, const SelfAttentionArguments& a) {
  const size_t layers = a.weight.size();
  if (layers != 1 && layers != 3) fail(op, ": weight must hold the weights of one or three layers, got ", layers);
  const int64_t columns = a.positive.dim() > 0 ? a.positive.size(a.positive.dim() - 1) : 0;
  const int64_t words = 32 * a.heads * (layers == 1 ? 3 : 1);
  if (columns == 0 || columns % words != 0) {
    fail(op, ": positive must be of heads of whole words, a multiple of ", words, " columns, got ", columns);
  }
  const auto one_a_layer = [&](const char* name, size_t got, bool needed) {
    if (got == layers || (got == 0 && !needed)) return;
    fail(op, ": ", name, " must hold one entry for each of the ", layers, " weights", needed ? "" : " or none",
         ", got ", got);
  };
  one_a_layer("shift", a.shift.size(), false);
  one_a_layer("threshold", a.threshold.size(), true);
  one_a_layer("weight_nonzero", a.weight_nonzero.size(), false);
  return columns;
}

inline SelfAttention::SelfAttention(const char* op, const Tensor& x, const SelfAttentionArguments& arguments)
    : a(arguments),
      rows(attention_rows(op, x, a)),
      levels(levels_of(op, a.levels)),
      layers(static_cast<int64_t>(a.weight.size())),
      columns(projected_columns(op, a)),
      width(layers == 1 ? columns / 3 : columns),
      shifts(a.weight.size()),
      ranges(output_ranges(op, a.positive, a.negative, a.single, {layers}, columns)),
      context_ranges(output_ranges(op, a.context_positive, a.context_negative, std::nullopt, {}, width, "context_")),
      last(op, width, "out", a.out, a.out_nonzero, a.scale, a.bias, a.out_levels) {
  for (size_t i = 0; i < a.weight.size(); ++i) {
    std::optional<Tensor> nonzero;
    if (!a.weight_nonzero.empty() && a.weight_nonzero[i].numel() > 0) nonzero = a.weight_nonzero[i];
    weights.push_back(binary_weight(op, a.weight[i], nonzero, columns, rows.k));
    if (!a.shift.empty()) shifts[i] = checked(op, "shift", a.shift[i], ScalarType::Float, {rows.k});
  }
  first = a.lengths ? first_rows(op, *a.lengths, rows.m, "x") : first_rows(x.size(0), x.size(1));
  const int64_t sequences = static_cast<int64_t>(first.size()) - 1;
  p.batch = sequences * a.heads;
  p.n = p.m = a.lengths ? longest(first) : x.size(1);
  p.d = p.e = width / a.heads;
  Rule{op, a.rule, a.scaling, a.beta}.apply(a.alpha_q, a.alpha_k, a.alpha_a, p);
  if (a.mask) {
    attended = mask_view(op, *a.mask, {sequences, a.heads, p.n, p.m});
    p.mask = attended->mask;
  }
}

inline PackedRows SelfAttention::run(const char* op, const float* x, const std::optional<LayerNormParams>& before) {
  std::vector<PackedRows> inputs, projected;
  const size_t inputs_count = one_input() ? 1 : weights.size();
  for (size_t i = 0; i < inputs_count; ++i) {
    inputs.emplace_back(rows.m * word_count(rows.k), levels == Levels::sign);
    std::vector<RowStep> steps;
    if (before && i == 0) steps.emplace_back(*before);
    steps.emplace_back(packing(before ? before->out : x, rows.m, rows.k, shifts[i], levels,
                               static_cast<float>(a.threshold[i]), inputs[i]));
    for (size_t layer = i; layer < (inputs_count == 1 ? weights.size() : i + 1); ++layer) {
      projected.emplace_back(rows.m * word_count(columns), a.negative.has_value());
      BinaryMatmulParams product = weights[layer].product(rows.m);
      inputs[i].read_by(product, levels);
      const PackedRows& out = projected.back();
      product.bits = ranges.output(out.sign.get(), out.nonzero.get(), static_cast<int64_t>(layer));
      steps.emplace_back(product);
    }
    run_with_layer_norm(op, steps);
  }
  const auto heads_of = [&](size_t i) {
    const PackedRows& packed = projected[layers == 1 ? 0 : i];
    const int64_t at = layers == 1 ? static_cast<int64_t>(i) * width / 32 : 0;
    return AttentionRows{columns / 32, packed.sign.get() + at, packed.nonzero ? packed.nonzero.get() + at : nullptr};
  };
  PackedRows context(rows.m * width / 32, a.context_negative.has_value());
  p.bits.heads = a.heads;
  p.bits.q = heads_of(0);
  p.bits.k = heads_of(1);
  p.bits.v = heads_of(2);
  p.bits.q_first = p.bits.k_first = first.data();
  p.bits.out = context_ranges.output(context.sign.get(), context.nonzero.get());
  p.parallel_for = torch_parallel_for;
  require(op, binary_attention(p));
  return context;
}

// The weight and bias of a normalisation of rows of n floats.
struct Norm {
  Tensor weight, bias;
  float eps;

  Norm(const char* op, const std::string& prefix, const Tensor& weights, const Tensor& biases, double epsilon,
       int64_t n)
      : weight(checked(op, (prefix + "weight").c_str(), weights, ScalarType::Float, {n})),
        bias(checked(op, (prefix + "bias").c_str(), biases, ScalarType::Float, {n})),
        eps(static_cast<float>(epsilon)) {}

  LayerNormParams of(const float* rows, float* out, int64_t m) const {
    LayerNormParams p;
    p.x = rows;
    p.out = out;
    p.m = m;
    p.n = weight.size(0);
    p.weight = data<float>(weight);
    p.bias = data<float>(bias);
    p.eps = eps;
    p.parallel_for = torch_parallel_for;
    return p;
  }
};

}  // namespace bitmill

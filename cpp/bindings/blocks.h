// SPDX-License-Identifier: Apache-2.0
// The parts of the ops of whole blocks: what they take, checked, and what they compute as steps of rows (row_steps.h).
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
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

  // Raises if its input has zeros and its levels none.
  void require_zeros(const char* op, const std::string& name, bool zeros) const {
    if (zeros && levels != Levels::sign) fail(op, ": ", name, " goes with levels \"sign\" of the layer after it");
  }

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

// down(f(up(x))) of rows of floats.
struct Mlp {
  Levels levels;
  std::optional<Tensor> shift;
  float threshold;
  int64_t inner;
  BinaryWeight first;
  OutputRanges ranges;
  LastLayer last;

  // `prefix` stands before the names that an attention's arguments have too.
  Mlp(const char* op, int64_t k, const MlpArguments& a, const std::string& prefix = "")
      : levels(levels_of(op, a.levels)),
        shift(checked(op, (prefix + "shift").c_str(), a.shift, ScalarType::Float, {k})),
        threshold(static_cast<float>(a.threshold)),
        inner(a.positive.dim() > 0 ? a.positive.size(a.positive.dim() - 1) : 0),
        first(binary_weight(op, a.up, a.up_nonzero, inner, k, "up")),
        ranges(output_ranges(op, a.positive, a.negative, a.single, {}, inner, prefix)),
        last(op, inner, "down", a.down, a.down_nonzero, a.scale, a.bias, a.inner_levels, prefix) {
    last.require_zeros(op, prefix + "negative", ranges.negative.has_value());
  }

  struct Scratch {
    PackedRows input, between;

    Scratch(const Mlp& mlp, int64_t m)
        : input(m * word_count(mlp.first.k), mlp.levels == Levels::sign),
          between(m * word_count(mlp.inner), mlp.ranges.negative.has_value()) {}
  };

  // Packing and both products.
  void add_steps(std::vector<RowStep>& steps, const float* x, int64_t m, const float* residual, float* out,
                 const Scratch& scratch) const {
    BinaryMatmulParams up = first.product(m);
    scratch.input.read_by(up, levels);
    up.bits = ranges.output(scratch.between.sign.get(), scratch.between.nonzero.get());
    steps.emplace_back(packing(x, m, first.k, shift, levels, threshold, scratch.input));
    steps.emplace_back(up);
    steps.emplace_back(last.product(scratch.between, m, residual, out));
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

// One of a list where an empty tensor stands for none, as an empty list does for all.
inline std::optional<Tensor> entry_of(const std::vector<Tensor>& tensors, size_t i) {
  if (tensors.empty() || tensors[i].numel() == 0) return std::nullopt;
  return tensors[i];
}

// attention(query(x), key(x), value(x)), as the packed input of the output projection.
struct SelfAttention {
  SelfAttentionArguments a;
  int64_t m, k;
  Levels levels;
  int64_t layers, columns, width;  // columns: of a layer; width: of queries, keys and values each
  std::vector<BinaryWeight> weights;
  std::vector<std::optional<Tensor>> shifts;
  OutputRanges ranges, context_ranges;
  LastLayer last;
  BinaryAttentionParams p;
  std::vector<int64_t> first;
  std::optional<MaskView> attended;

  // Of `rows`, as attention_rows has checked them.
  SelfAttention(const char* op, const Rows& rows, SelfAttentionArguments arguments);

  struct Scratch {
    std::vector<PackedRows> inputs, projected;

    explicit Scratch(const SelfAttention& of) {
      for (int64_t i = 0; i < (of.one_input() ? 1 : of.layers); ++i) {
        inputs.emplace_back(of.m * word_count(of.k), of.levels == Levels::sign);
      }
      for (int64_t i = 0; i < of.layers; ++i) {
        projected.emplace_back(of.m * word_count(of.columns), of.ranges.negative.has_value());
      }
    }
  };

  // Packing and projections of rows of floats x [m, k].
  void add_projections(std::vector<RowStep>& steps, const float* x, const Scratch& scratch) const;
  // The context of what they have computed.
  PackedRows attend(const char* op, const Scratch& scratch);

 private:
  bool one_input() const {
    const auto same = [&](double each) { return each == a.threshold[0]; };
    return a.shift.empty() && std::all_of(a.threshold.begin(), a.threshold.end(), same);
  }
};

inline Rows attention_rows(const char* op, const Tensor& x, bool lengths) {
  if (x.dim() != (lengths ? 2 : 3)) {
    fail(op, ": x must have shape ", lengths ? "[rows, k] with lengths" : "[sequences, n, k]", ", got ",
         to_string(sizes_of(x)));
  }
  return float_rows(op, x);
}

// How many columns a layer has.
inline int64_t projected_columns(const char* op, const SelfAttentionArguments& a) {
  if (a.heads < 1) fail(op, ": heads must be at least 1, got ", a.heads);
  if (a.lengths && a.mask) fail(op, ": mask and lengths exclude each other, got both");
  const size_t layers = a.weight.size();
  if (layers != 1 && layers != 3) fail(op, ": weight must hold the weights of one or three layers, got ", layers);
  const int64_t columns = a.positive.dim() > 0 ? a.positive.size(a.positive.dim() - 1) : 0;
  if (a.heads > kMaxColumns) fail(op, ": heads must be at most ", kMaxColumns, ", got ", a.heads);
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

inline SelfAttention::SelfAttention(const char* op, const Rows& rows, SelfAttentionArguments arguments)
    : a(std::move(arguments)),
      m(rows.m),
      k(rows.k),
      levels(levels_of(op, a.levels)),
      layers(static_cast<int64_t>(a.weight.size())),
      columns(projected_columns(op, a)),
      width(layers == 1 ? columns / 3 : columns),
      shifts(a.weight.size()),
      ranges(output_ranges(op, a.positive, a.negative, a.single, {layers}, columns)),
      context_ranges(output_ranges(op, a.context_positive, a.context_negative, std::nullopt, {}, width, "context_")),
      last(op, width, "out", a.out, a.out_nonzero, a.scale, a.bias, a.out_levels) {
  last.require_zeros(op, "context_negative", context_ranges.negative.has_value());
  for (size_t i = 0; i < a.weight.size(); ++i) {
    weights.push_back(binary_weight(op, a.weight[i], entry_of(a.weight_nonzero, i), columns, k));
    shifts[i] = checked(op, "shift", entry_of(a.shift, i), ScalarType::Float, {k});
  }
  const CpuCall call(op, "x", rows.x);
  first = a.lengths ? first_rows(call, op, *a.lengths, m, "x") : first_rows(rows.leading[0], rows.leading[1]);
  const int64_t sequences = static_cast<int64_t>(first.size()) - 1;
  p.batch = sequences * a.heads;
  p.n = p.m = a.lengths ? longest(first) : rows.leading[1];
  p.d = p.e = width / a.heads;
  const Rule rule{op, a.rule, a.scaling, a.beta};
  rule.apply(call, a.alpha_q, a.alpha_k, a.alpha_a, p);
  rule.read_steps(a.alpha_q, a.alpha_k, a.alpha_a, p);
  if (a.mask) {
    attended = mask_view(call, op, *a.mask, {sequences, a.heads, p.n, p.m});
    p.mask = attended->mask;
  }
}

inline void SelfAttention::add_projections(std::vector<RowStep>& steps, const float* x, const Scratch& scratch) const {
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool shared = i >= scratch.inputs.size();  // the first one's input
    const PackedRows &input = scratch.inputs[shared ? 0 : i], &out = scratch.projected[i];
    if (!shared) steps.emplace_back(packing(x, m, k, shifts[i], levels, static_cast<float>(a.threshold[i]), input));
    BinaryMatmulParams product = weights[i].product(m);
    input.read_by(product, levels);
    product.bits = ranges.output(out.sign.get(), out.nonzero.get(), static_cast<int64_t>(i));
    steps.emplace_back(product);
  }
}

inline PackedRows SelfAttention::attend(const char* op, const Scratch& scratch) {
  const auto heads_of = [&](size_t i) {
    const PackedRows& packed = scratch.projected[layers == 1 ? 0 : i];
    const int64_t at = layers == 1 ? static_cast<int64_t>(i) * width / 32 : 0;
    return AttentionRows{columns / 32, packed.sign.get() + at, packed.nonzero ? packed.nonzero.get() + at : nullptr};
  };
  PackedRows context(m * width / 32, context_ranges.negative.has_value());
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

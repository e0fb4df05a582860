// SPDX-License-Identifier: Apache-2.0
// The CPU ops of whole blocks, floats in and floats out with bits between: check, allocate, call. Schemas:
// python/bitmill/ops/binary_blocks.py.
#include "attention_checks.h"
#include "bit_checks.h"
#include "boxing.h"

namespace bitmill {
namespace {

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
  Tensor scale, out;
  std::optional<Tensor> bias, residual;

  LastLayer(const char* op, const Rows& rows, int64_t k, const std::string& name, const Tensor& tiles,
            const std::optional<Tensor>& nonzero, const Tensor& scales, const std::optional<Tensor>& biases,
            const std::optional<Tensor>& added, const std::string& levels_name)
      : weight(binary_weight(op, tiles, nonzero, scales.dim() > 0 ? scales.size(0) : 0, k, name)),
        levels(levels_of(op, levels_name)),
        scale(checked(op, "scale", scales, ScalarType::Float, {weight.n, 1})),
        out(new_tensor(with_last(rows.leading, weight.n), ScalarType::Float)),
        bias(checked(op, "bias", biases, ScalarType::Float, {weight.n})),
        residual(checked(op, "residual", added, ScalarType::Float, with_last(rows.leading, weight.n))) {}

  BinaryMatmulParams product(const PackedRows& rows, int64_t m) const {
    BinaryMatmulParams p = weight.product(m);
    rows.read_by(p, levels);
    p.scale = data<float>(scale);
    p.bias = data_or_null<float>(bias);
    p.residual = data_or_null<float>(residual);
    p.out = out.mutable_data_ptr();
    return p;
  }
};

Rows float_rows(const char* op, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float) fail(op, ": x must be float32, got ", dtype_name(x.scalar_type()));
  return rows_of(op, x);
}

// Packs x; `packed` gets the rows.
BitpackParams packing(const char* op, const Rows& rows, const std::optional<Tensor>& shift, Levels levels,
                      double threshold, const PackedRows& packed) {
  BitpackParams p = pack_rows(op, rows, shift, levels, threshold);
  p.sign = packed.sign.get();
  p.nonzero = packed.nonzero.get();
  return p;
}

Tensor binary_mlp_cpu(Tensor x, std::optional<Tensor> residual, std::optional<Tensor> shift, double threshold,
                      std::string levels, Tensor up, std::optional<Tensor> up_nonzero, Tensor positive,
                      std::optional<Tensor> negative, std::optional<Tensor> single, std::string inner_levels,
                      Tensor down, std::optional<Tensor> down_nonzero, Tensor scale, std::optional<Tensor> bias) {
  const char* op = "binary_mlp";
  const Levels kind = levels_of(op, levels);
  const Rows rows = float_rows(op, x);
  const int64_t inner = positive.dim() > 0 ? positive.size(positive.dim() - 1) : 0;
  const auto shift_row = checked(op, "shift", shift, ScalarType::Float, {rows.k});
  const BinaryWeight first = binary_weight(op, up, up_nonzero, inner, rows.k, "up");
  const OutputRanges ranges = output_ranges(op, positive, negative, single, {}, inner);
  const LastLayer last(op, rows, inner, "down", down, down_nonzero, scale, bias, residual, inner_levels);

  const PackedRows packed(rows.m * word_count(rows.k), kind == Levels::sign);
  const PackedRows between(rows.m * word_count(inner), negative.has_value());
  BinaryMatmulParams products[] = {first.product(rows.m), last.product(between, rows.m)};
  packed.read_by(products[0], kind);
  products[0].bits = ranges.output(between.sign.get(), between.nonzero.get());
  require(op, binary_linear(packing(op, rows, shift_row, kind, threshold, packed), products, 2));
  return last.out;
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
  const Levels kind = levels_of(op, levels);
  if (heads < 1) fail(op, ": heads must be at least 1, got ", heads);
  if (lengths && mask) fail(op, ": mask and lengths exclude each other, got both");
  if (x.dim() != (lengths ? 2 : 3)) {
    fail(op, ": x must have shape ", lengths ? "[rows, k] with lengths" : "[sequences, n, k]", ", got ",
         to_string(sizes_of(x)));
  }
  const Rows rows = float_rows(op, x);
  const int64_t count = static_cast<int64_t>(weight.size());
  if (count != 1 && count != 3) fail(op, ": weight must hold the weights of one or three layers, got ", count);
  const int64_t columns = positive.dim() > 0 ? positive.size(positive.dim() - 1) : 0;  // of a layer
  if (columns == 0 || columns % (32 * heads * (count == 1 ? 3 : 1)) != 0) {
    fail(op, ": positive must be of heads of whole words, a multiple of ", 32 * heads * (count == 1 ? 3 : 1),
         " columns, got ", columns);
  }
  const auto one_a_layer = [&](const char* name, size_t got, bool needed) {
    if (got == weight.size() || (got == 0 && !needed)) return;
    fail(op, ": ", name, " must hold one entry for each of the ", count, " weights", needed ? "" : " or none", ", got ",
         got);
  };
  one_a_layer("shift", shift.size(), false);
  one_a_layer("threshold", threshold.size(), true);
  one_a_layer("weight_nonzero", weight_nonzero.size(), false);

  std::vector<BinaryWeight> weights;
  std::vector<std::optional<Tensor>> shifts(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    std::optional<Tensor> nonzero;
    if (!weight_nonzero.empty() && weight_nonzero[i].numel() > 0) nonzero = weight_nonzero[i];
    weights.push_back(binary_weight(op, weight[i], nonzero, columns, rows.k));
    if (!shift.empty()) shifts[i] = checked(op, "shift", shift[i], ScalarType::Float, {rows.k});
  }
  const OutputRanges ranges = output_ranges(op, positive, negative, single, {count}, columns);
  const int64_t width = count == 1 ? columns / 3 : columns;  // of queries, keys and values each
  const OutputRanges context_ranges =
      output_ranges(op, context_positive, context_negative, std::nullopt, {}, width, "context_");
  const LastLayer last(op, rows, width, "out", out, out_nonzero, scale, bias, residual, out_levels);

  BinaryAttentionParams p;
  const auto first = lengths ? first_rows(op, *lengths, rows.m, "x") : first_rows(x.size(0), x.size(1));
  const int64_t sequences = static_cast<int64_t>(first.size()) - 1;
  p.batch = sequences * heads;
  p.n = p.m = lengths ? longest(first) : x.size(1);
  p.d = p.e = width / heads;
  Rule{op, rule, scaling, beta}.apply(alpha_q, alpha_k, alpha_a, p);
  std::optional<MaskView> attended;
  if (mask) {
    attended = mask_view(op, *mask, {sequences, heads, p.n, p.m});
    p.mask = attended->mask;
  }

  std::vector<PackedRows> inputs, projected;
  std::vector<BinaryMatmulParams> products;
  const bool one_input = shift.empty() && std::all_of(threshold.begin(), threshold.end(),
                                                      [&](double each) { return each == threshold[0]; });
  for (size_t i = 0; i < weight.size(); ++i) {
    if (i == 0 || !one_input) inputs.emplace_back(rows.m * word_count(rows.k), kind == Levels::sign);
    projected.emplace_back(rows.m * word_count(columns), negative.has_value());
    products.push_back(weights[i].product(rows.m));
    inputs.back().read_by(products[i], kind);
    products[i].bits = ranges.output(projected[i].sign.get(), projected[i].nonzero.get(), static_cast<int64_t>(i));
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const BitpackParams pack = packing(op, rows, shifts[i], kind, threshold[i], inputs[i]);
    require(op, binary_linear(pack, products.data() + i, one_input ? count : 1));
  }

  const auto heads_of = [&](size_t i) {
    const PackedRows& packed = projected[count == 1 ? 0 : i];
    const int64_t at = count == 1 ? static_cast<int64_t>(i) * width / 32 : 0;
    return AttentionRows{columns / 32, packed.sign.get() + at, packed.nonzero ? packed.nonzero.get() + at : nullptr};
  };
  const PackedRows context(rows.m * width / 32, context_negative.has_value());
  p.bits.heads = heads;
  p.bits.q = heads_of(0);
  p.bits.k = heads_of(1);
  p.bits.v = heads_of(2);
  p.bits.q_first = p.bits.k_first = first.data();
  p.bits.out = context_ranges.output(context.sign.get(), context.nonzero.get());
  p.parallel_for = torch_parallel_for;
  require(op, binary_attention(p));
  require(op, binary_matmul(last.product(context, rows.m)));
  return last.out;
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("binary_mlp", BITMILL_BOX(bitmill::binary_mlp_cpu));
  m.impl("binary_self_attention", BITMILL_BOX(bitmill::binary_self_attention_cpu));
}

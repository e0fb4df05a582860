// SPDX-License-Identifier: Apache-2.0
// The ops of binary attention, for every device: check, allocate, call. A Device is a call of an op on one: it checks
// tensors, makes new ones, and runs core's function or its kernels.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention_checks.h"

namespace bitmill {

// The learned steps of the elastic rule: numbers on the device of the call, or none for another rule; that of the
// values is none too where the context stays whole.
struct LearnedSteps {
  std::optional<Tensor> q, k, a, v;
};

template <class Device>
Tensor binary_attention_op(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, std::string rule,
                           std::optional<double> scaling, double beta, std::string zero, std::optional<Tensor> alpha_q,
                           std::optional<Tensor> alpha_k, std::optional<Tensor> alpha_v, std::optional<Tensor> alpha_a,
                           std::optional<Tensor> value_addend) {
  const char* op = "binary_attention";
  const Device device(op, "q", q);
  BinaryAttentionParams p;
  rule_of(op, rule);
  if (zero != "torch" && zero != "plus") fail(op, ": zero must be \"torch\" or \"plus\", got \"", zero, "\"");
  p.zeros = zero == "torch";
  p.dtype = float_dtype(op, q, "q must be float32, bfloat16 or float16");
  const int64_t dims = q.dim();
  if (dims < 2 || k.dim() != dims || v.dim() != dims || q.size(dims - 1) != k.size(dims - 1) || q.size(dims - 1) == 0) {
    fail(op, ": expected q [..., n, d], k [..., m, d] and v [..., m, e] with d > 0, got ", to_string(sizes_of(q)), ", ",
         to_string(sizes_of(k)), " and ", to_string(sizes_of(v)));
  }
  const Sizes leading = without_last_two(sizes_of(q));
  p.n = q.size(dims - 2);
  p.d = q.size(dims - 1);
  p.m = k.size(dims - 2);
  p.e = v.size(dims - 1);
  p.batch = std::accumulate(leading.begin(), leading.end(), int64_t{1}, std::multiplies<>());
  if (std::max(p.d, p.m) > kMaxColumns) {
    fail(op, ": d and m must be at most ", kMaxColumns, ", got ", p.d, " and ", p.m);
  }
  device.check("k", k, q.scalar_type(), with_last(with_last(leading, p.m), p.d));
  device.check("v", v, q.scalar_type(), with_last(with_last(leading, p.m), p.e));
  const Rule chosen{op, rule, scaling, beta};
  chosen.apply(device, alpha_q, alpha_k, alpha_a, p);
  chosen.check_step(device, "alpha_v", alpha_v);
  const Tensor q_placed = device.placed(q), k_placed = device.placed(k), v_placed = device.placed(v);
  const View queries = view_of(q_placed), keys = view_of(k_placed), values = view_of(v_placed);
  p.q = queries.matrices;
  p.k = keys.matrices;
  p.v = values.matrices;
  std::optional<MaskView> attended;
  if (mask) {
    attended = mask_view(device, op, *mask, with_last(with_last(leading, p.n), p.m));
    p.mask = attended->mask;
  }
  std::optional<MaskView> addend;
  std::vector<int64_t> addend_of;  // of every matrix of the batch
  if (value_addend) {
    if (p.rule != AttentionRule::elastic) fail(op, ": value_addend goes with rule \"elastic\", got \"", rule, "\"");
    if (value_addend->scalar_type() != ScalarType::Float) {
      fail(op, ": value_addend must be float32, got ", dtype_name(value_addend->scalar_type()));
    }
    addend = broadcast_view(device, op, "value_addend", *value_addend, with_last(with_last(leading, p.m), 1));
    for (const int64_t matrix : addend->of) addend_of.push_back(addend->offset[static_cast<size_t>(matrix)]);
    p.value_addend = addend->mask.values;
    p.value_addend.offset = addend_of.data();
  }
  const Tensor context = new_context(device, leading, p.n, p.e, q.scalar_type());
  const View out = view_of(context);
  p.out = context.mutable_data_ptr();
  p.out_offset = out.offset.data();
  p.out_row_stride = out.matrices.row_stride;
  device.require(device.attend(p, chosen, {alpha_q, alpha_k, alpha_a, alpha_v}));
  return context;
}

// Rows of packed heads.
struct PackedHeads {
  Tensor sign;
  std::optional<Tensor> nonzero;
  int64_t words = 0, stride = 0;  // of a row, and from one to the next

  AttentionRows rows() const { return {stride, data<int32_t>(sign), data_or_null<int32_t>(nonzero)}; }
};

// How far apart the rows of t lie, one sequence after another; such as a third of wider ones. 0 if at no one distance.
// The stride of a dimension of size 1 says nothing.
inline int64_t distance_of_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1, rows = t.size(last - 1), sequences = last == 2 ? t.size(0) : 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return 0;
  if (rows > 1 && sequences > 1 && t.stride(0) != rows * t.stride(1)) return 0;
  return rows > 1 ? t.stride(last - 1) : sequences > 1 ? t.stride(0) : t.size(last);
}

template <class Device>
PackedHeads packed_heads(const Device& device, const char* op, const char* name, const Tensor& sign,
                         const std::string& nonzero_name, const std::optional<Tensor>& nonzero, int64_t dims,
                         int64_t heads) {
  if (sign.dim() != dims) {
    fail(op, ": ", name, " must have ", dims, " dimensions like q, got shape ", to_string(sizes_of(sign)));
  }
  const Sizes sizes = sizes_of(sign);
  if (sizes.back() == 0 || sizes.back() % heads != 0) {
    fail(op, ": ", name, " must have a positive multiple of heads = ", heads, " words a row, got ", sizes.back());
  }
  device.check(name, sign, ScalarType::Int, sizes);
  if (nonzero) device.check(nonzero_name.c_str(), *nonzero, ScalarType::Int, sizes);
  const int64_t words = sizes.back(), distance = distance_of_rows(sign);
  if (distance > 0 && (!nonzero || distance_of_rows(*nonzero) == distance)) return {sign, nonzero, words, distance};
  return {as_contiguous(sign), nonzero ? std::optional(as_contiguous(*nonzero)) : std::nullopt, words, words};
}

template <class Device>
std::tuple<Tensor, Tensor> binary_attention_bits_op(Tensor q, Tensor k, Tensor v, std::optional<Tensor> q_nonzero,
                                                    std::optional<Tensor> k_nonzero, std::optional<Tensor> v_nonzero,
                                                    std::optional<Tensor> mask, std::optional<Tensor> lengths,
                                                    int64_t heads, Tensor positive, std::optional<Tensor> negative,
                                                    std::string rule, std::optional<double> scaling, double beta,
                                                    std::optional<Tensor> alpha_q, std::optional<Tensor> alpha_k,
                                                    std::optional<Tensor> alpha_a) {
  const char* op = "binary_attention_bits";
  const Device device(op, "q", q);
  if (heads < 1) fail(op, ": heads must be at least 1, got ", heads);
  if (lengths && mask) fail(op, ": mask and lengths exclude each other, got both");
  const int64_t dims = lengths ? 2 : 3;
  if (q.dim() != dims) {
    fail(op, ": q must have shape ", lengths ? "[rows, words] with lengths" : "[sequences, n, words]", ", got ",
         to_string(sizes_of(q)));
  }
  const PackedHeads queries = packed_heads(device, op, "q", q, "q_nonzero", q_nonzero, dims, heads);
  const PackedHeads keys = packed_heads(device, op, "k", k, "k_nonzero", k_nonzero, dims, heads);
  const PackedHeads values = packed_heads(device, op, "v", v, "v_nonzero", v_nonzero, dims, heads);
  Sizes expected = sizes_of(lengths ? q : k);
  expected[0] = q.size(0);
  expected.back() = queries.words;
  device.check("k", k, ScalarType::Int, expected);
  expected.back() = values.words;
  device.check("v", v, ScalarType::Int, expected);

  BinaryAttentionParams p;
  const auto q_first = lengths ? first_rows(device, op, *lengths, q.size(0), "q") : first_rows(q.size(0), q.size(1));
  const int64_t sequences = static_cast<int64_t>(q_first.size()) - 1;
  const auto k_first = lengths ? q_first : first_rows(sequences, k.size(1));
  p.batch = sequences * heads;
  p.n = lengths ? longest(q_first) : q.size(1);
  p.m = lengths ? p.n : k.size(1);
  p.d = queries.words / heads * 32;
  p.e = values.words / heads * 32;
  if (std::max(p.d, p.m) > kMaxColumns) {
    fail(op, ": d and m must be at most ", kMaxColumns, ", got ", p.d, " and ", p.m);
  }
  const Rule chosen{op, rule, scaling, beta};
  chosen.apply(device, alpha_q, alpha_k, alpha_a, p);
  const Sizes ranges = {2, heads * p.e};
  const Tensor above = device.checked("positive", positive, ScalarType::Int, ranges);
  const auto below = device.checked("negative", negative, ScalarType::Int, ranges);
  std::optional<MaskView> attended;
  if (mask) {
    attended = mask_view(device, op, *mask, {sequences, heads, p.n, p.m});
    p.mask = attended->mask;
  }
  Sizes plane = sizes_of(q);
  plane.back() = values.words;
  const Tensor sign = device.new_tensor(plane, ScalarType::Int);
  const Tensor nonzero = device.new_tensor(below ? plane : Sizes{0}, ScalarType::Int);
  p.bits.heads = heads;
  p.bits.q = queries.rows();
  p.bits.k = keys.rows();
  p.bits.v = values.rows();
  p.bits.q_first = q_first.data();
  p.bits.k_first = k_first.data();
  p.bits.out = {mutable_data<int32_t>(sign), below ? mutable_data<int32_t>(nonzero) : nullptr, data<int32_t>(above),
                data_or_null<int32_t>(below)};
  device.require(device.attend(p, chosen, {alpha_q, alpha_k, alpha_a, std::nullopt}));
  return {sign, nonzero};
}

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// The CPU ops of binary attention: check, allocate, call. Schemas: python/bitmill/ops/binary_attention.py and
// binary_attention_bits.py.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "binary_attention.h"
#include "boxing.h"
#include "checks.h"

namespace bitmill {
namespace {

constexpr float kAlphaFloor = 1e-5f;

AttentionRule rule_of(const char* op, const std::string& rule) {
  if (rule == "bool") return AttentionRule::bool_;
  if (rule == "softmax_aware") return AttentionRule::softmax_aware;
  if (rule == "elastic") return AttentionRule::elastic;
  fail(op, ": rule must be \"bool\", \"softmax_aware\" or \"elastic\", got \"", rule, "\"");
}

// k and v are like q: its device and dtype, and these sizes.
void check_like(const char* op, const Tensor& q, const char* name, const Tensor& t, const Sizes& sizes) {
  if (!t.is_cpu()) fail(op, ": ", name, " must be on the CPU like q, got another device");
  if (t.scalar_type() != q.scalar_type()) {
    fail(op, ": ", name, " must be ", dtype_name(q.scalar_type()), ", got ", dtype_name(t.scalar_type()));
  }
  if (!same_sizes(t, sizes)) {
    fail(op, ": ", name, " must have shape ", to_string(sizes), ", got ", to_string(sizes_of(t)));
  }
}

// A tensor of matrices [..., rows, columns], without moving it; `offset` has an entry a matrix.
struct View {
  Matrices matrices;
  std::vector<int64_t> offset;
};

// `leading` sizes of t, and their strides.
std::vector<int64_t> offsets(const Sizes& sizes, const Sizes& strides) {
  std::vector<int64_t> offset = {0};
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::vector<int64_t> next;
    next.reserve(offset.size() * static_cast<size_t>(sizes[i]));
    for (const int64_t start : offset) {
      for (int64_t j = 0; j < sizes[i]; ++j) next.push_back(start + j * strides[i]);
    }
    offset = std::move(next);
  }
  return offset;
}

Sizes strides_of(const Tensor& t) {
  const auto strides = t.strides();
  return {strides.begin(), strides.end()};
}

Sizes without_last_two(Sizes sizes) {
  sizes.resize(sizes.size() - 2);
  return sizes;
}

View view_of(const Tensor& t) {
  const Sizes strides = strides_of(t);
  View view{{}, offsets(without_last_two(sizes_of(t)), without_last_two(strides))};
  view.matrices = {t.const_data_ptr(), view.offset.data(), strides[strides.size() - 2], strides.back()};
  return view;
}

// [..., n, e] in the memory of [first, n, ..., e]: heads beside each other, so merging them copies nothing.
Tensor new_context(const Sizes& leading, int64_t n, int64_t e, ScalarType dtype) {
  Sizes sizes = leading;
  sizes.insert(sizes.end(), {n, e});
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (leading.size() >= 2) std::rotate(order.begin() + 1, order.end() - 2, order.end() - 1);
  return new_tensor(sizes, dtype, order);
}

// A mask broadcast to [..., n, m]: which of its matrices each of the batch reads, and their places.
struct MaskView {
  Sizes sizes, strides;  // of as many dimensions as the scores; 1 where one entry serves all
  std::vector<int64_t> offset, of;
  AttentionMask mask;
};

MaskView broadcast_view(const char* op, const char* name, const Tensor& t, const Sizes& scores) {
  if (!t.is_cpu()) fail(op, ": ", name, " must be on the CPU like q, got another device");
  MaskView view;
  const Sizes sizes = sizes_of(t), strides = strides_of(t);
  const size_t missing = scores.size() - std::min(scores.size(), sizes.size());
  bool fits = sizes.size() <= scores.size();
  for (size_t i = 0; i < scores.size() && fits; ++i) {
    const int64_t size = i < missing ? 1 : sizes[i - missing], stride = i < missing ? 0 : strides[i - missing];
    fits = size == 1 || size == scores[i];
    const bool shared = size == 1 || stride == 0;  // an expanded mask is read once too
    view.sizes.push_back(shared ? std::min<int64_t>(size, 1) : size);
    view.strides.push_back(shared ? 0 : stride);
  }
  if (!fits) fail(op, ": ", name, " must be broadcastable to ", to_string(scores), ", got shape ", to_string(sizes));
  const Sizes leading = without_last_two(view.sizes), all = without_last_two(scores);
  view.offset = offsets(leading, without_last_two(view.strides));
  Sizes places(leading.size());  // of the matrices among themselves
  int64_t step = 1;
  for (size_t i = leading.size(); i-- > 0;) {
    places[i] = leading[i] > 1 ? step : 0;
    step *= leading[i];
  }
  view.of = offsets(all, places);
  view.mask.count = static_cast<int64_t>(view.offset.size());
  view.mask.rows = view.sizes[view.sizes.size() - 2];
  view.mask.values = {t.const_data_ptr(), view.offset.data(), view.strides[scores.size() - 2], view.strides.back()};
  view.mask.of = view.of.data();
  return view;
}

MaskView mask_view(const char* op, const Tensor& t, const Sizes& scores) {
  MaskView view = broadcast_view(op, "mask", t, scores);
  view.mask.boolean = t.scalar_type() == ScalarType::Bool;
  if (!view.mask.boolean) view.mask.dtype = float_dtype(op, t, "mask must be bool, float32, bfloat16 or float16");
  return view;
}

// What the rule of the map needs, checked.
struct Rule {
  const char* op;
  std::string name;
  std::optional<double> scaling;
  double beta;

  void check_step(const char* step_name, const std::optional<Tensor>& step) const {
    if (step.has_value() != (name == "elastic")) {
      fail(op, ": ", step_name, " goes with rule \"elastic\" only, and is needed there; got rule \"", name, "\"");
    }
    checked(op, step_name, step, ScalarType::Float, {});
  }

  void apply(const std::optional<Tensor>& alpha_q, const std::optional<Tensor>& alpha_k,
             const std::optional<Tensor>& alpha_a, BinaryAttentionParams& p) const;
};

float step_of(const std::optional<Tensor>& alpha) {
  const float value = *data<float>(*alpha);
  return value < kAlphaFloor ? kAlphaFloor : value;
}

void Rule::apply(const std::optional<Tensor>& alpha_q, const std::optional<Tensor>& alpha_k,
                 const std::optional<Tensor>& alpha_a, BinaryAttentionParams& p) const {
  const float largest = std::numeric_limits<float>::max(), smallest = std::numeric_limits<float>::min();
  p.rule = rule_of(op, name);
  if (scaling && !(*scaling >= smallest && *scaling <= largest)) {
    fail(op, ": scaling must be a positive, finite float32, got ", *scaling);
  }
  if (!(beta > 0 && beta <= 1)) fail(op, ": beta must lie in (0, 1], got ", beta);
  check_step("alpha_q", alpha_q);
  check_step("alpha_k", alpha_k);
  check_step("alpha_a", alpha_a);
  const double root = std::sqrt(static_cast<double>(p.d));
  p.divide = !scaling;
  p.scale = static_cast<float>(scaling ? *scaling : root);
  p.gap = static_cast<float>(std::log(1 / beta));
  if (p.rule != AttentionRule::elastic) return;
  const double product = static_cast<double>(step_of(alpha_q)) * static_cast<double>(step_of(alpha_k));
  p.slope = scaling ? product * *scaling : product / root;
  p.threshold = static_cast<double>(step_of(alpha_a)) / 2;
}

Tensor binary_attention_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, std::string rule,
                            std::optional<double> scaling, double beta, std::string zero, std::optional<Tensor> alpha_q,
                            std::optional<Tensor> alpha_k, std::optional<Tensor> alpha_v, std::optional<Tensor> alpha_a,
                            std::optional<Tensor> value_addend) {
  const char* op = "binary_attention";
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
  check_like(op, q, "k", k, with_last(with_last(leading, p.m), p.d));
  check_like(op, q, "v", v, with_last(with_last(leading, p.m), p.e));
  const Rule chosen{op, rule, scaling, beta};
  chosen.apply(alpha_q, alpha_k, alpha_a, p);
  chosen.check_step("alpha_v", alpha_v);
  if (p.rule == AttentionRule::elastic) p.step = step_of(alpha_a) * step_of(alpha_v);
  const View queries = view_of(q), keys = view_of(k), values = view_of(v);
  p.q = queries.matrices;
  p.k = keys.matrices;
  p.v = values.matrices;
  std::optional<MaskView> attended;
  if (mask) {
    attended = mask_view(op, *mask, with_last(with_last(leading, p.n), p.m));
    p.mask = attended->mask;
  }
  std::optional<MaskView> addend;
  std::vector<int64_t> addend_of;  // of every matrix of the batch
  if (value_addend) {
    if (p.rule != AttentionRule::elastic) fail(op, ": value_addend goes with rule \"elastic\", got \"", rule, "\"");
    if (value_addend->scalar_type() != ScalarType::Float) {
      fail(op, ": value_addend must be float32, got ", dtype_name(value_addend->scalar_type()));
    }
    addend = broadcast_view(op, "value_addend", *value_addend, with_last(with_last(leading, p.m), 1));
    for (const int64_t matrix : addend->of) addend_of.push_back(addend->offset[static_cast<size_t>(matrix)]);
    p.value_addend = addend->mask.values;
    p.value_addend.offset = addend_of.data();
    p.addend_step = step_of(alpha_a);
  }
  const Tensor context = new_context(leading, p.n, p.e, q.scalar_type());
  const View out = view_of(context);
  p.out = context.mutable_data_ptr();
  p.out_offset = out.offset.data();
  p.out_row_stride = out.matrices.row_stride;
  p.parallel_for = torch_parallel_for;
  require(op, binary_attention(p));
  return context;
}

// Rows of packed heads.
struct PackedHeads {
  Tensor sign;
  std::optional<Tensor> nonzero;
  int64_t words = 0;  // of a row

  AttentionRows rows() const {
    return {sign.stride(sign.dim() - 2), data<int32_t>(sign), data_or_null<int32_t>(nonzero)};
  }
};

// Whether the rows of t lie at even distances, whole and one sequence after another; such as a third of wider ones.
bool evenly_spaced(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.stride(last) == 1 && (last == 1 || t.stride(0) == t.size(1) * t.stride(1));
}

PackedHeads packed_heads(const char* op, const char* name, const Tensor& sign, const std::string& nonzero_name,
                         const std::optional<Tensor>& nonzero, int64_t dims, int64_t heads) {
  if (sign.dim() != dims) {
    fail(op, ": ", name, " must have ", dims, " dimensions like q, got shape ", to_string(sizes_of(sign)));
  }
  const Sizes sizes = sizes_of(sign);
  if (sizes.back() == 0 || sizes.back() % heads != 0) {
    fail(op, ": ", name, " must have a positive multiple of heads = ", heads, " words a row, got ", sizes.back());
  }
  check(op, name, sign, ScalarType::Int, sizes);
  if (nonzero) check(op, nonzero_name.c_str(), *nonzero, ScalarType::Int, sizes);
  const int64_t row = dims - 2;
  if (evenly_spaced(sign) && (!nonzero || (evenly_spaced(*nonzero) && nonzero->stride(row) == sign.stride(row)))) {
    return {sign, nonzero, sizes.back()};
  }
  return {as_contiguous(sign), nonzero ? std::optional(as_contiguous(*nonzero)) : std::nullopt, sizes.back()};
}

// Where each sequence's rows begin: of `sequences` of n rows, or of these lengths.
std::vector<int64_t> first_rows(int64_t sequences, int64_t n) {
  std::vector<int64_t> first;
  for (int64_t i = 0; i <= sequences; ++i) first.push_back(i * n);
  return first;
}

std::vector<int64_t> first_rows(const char* op, const Tensor& lengths, int64_t rows) {
  if (lengths.dim() != 1) fail(op, ": lengths must have shape [sequences], got ", to_string(sizes_of(lengths)));
  const Tensor counts = checked(op, "lengths", lengths, ScalarType::Long, sizes_of(lengths));
  std::vector<int64_t> first = {0};
  for (int64_t i = 0; i < counts.size(0); ++i) {
    const int64_t length = data<int64_t>(counts)[i];
    if (length < 0 || length > rows - first.back()) {
      fail(op, ": lengths must be at least 0 and add up to the ", rows, " rows of q, got ", length, " at ", i);
    }
    first.push_back(first.back() + length);
  }
  if (first.back() != rows) fail(op, ": lengths must add up to the ", rows, " rows of q, got ", first.back());
  return first;
}

int64_t longest(const std::vector<int64_t>& first) {
  int64_t most = 0;
  for (size_t i = 1; i < first.size(); ++i) most = std::max(most, first[i] - first[i - 1]);
  return most;
}

std::tuple<Tensor, Tensor> binary_attention_bits_cpu(Tensor q, Tensor k, Tensor v, std::optional<Tensor> q_nonzero,
                                                     std::optional<Tensor> k_nonzero, std::optional<Tensor> v_nonzero,
                                                     std::optional<Tensor> mask, std::optional<Tensor> lengths,
                                                     int64_t heads, Tensor positive, std::optional<Tensor> negative,
                                                     std::string rule, std::optional<double> scaling, double beta,
                                                     std::optional<Tensor> alpha_q, std::optional<Tensor> alpha_k,
                                                     std::optional<Tensor> alpha_a) {
  const char* op = "binary_attention_bits";
  if (heads < 1) fail(op, ": heads must be at least 1, got ", heads);
  if (lengths && mask) fail(op, ": mask and lengths exclude each other, got both");
  const int64_t dims = lengths ? 2 : 3;
  if (q.dim() != dims) {
    fail(op, ": q must have shape ", lengths ? "[rows, words] with lengths" : "[sequences, n, words]", ", got ",
         to_string(sizes_of(q)));
  }
  const PackedHeads queries = packed_heads(op, "q", q, "q_nonzero", q_nonzero, dims, heads);
  const PackedHeads keys = packed_heads(op, "k", k, "k_nonzero", k_nonzero, dims, heads);
  const PackedHeads values = packed_heads(op, "v", v, "v_nonzero", v_nonzero, dims, heads);
  Sizes expected = sizes_of(lengths ? q : k);
  expected[0] = q.size(0);
  expected.back() = queries.words;
  checked(op, "k", k, ScalarType::Int, expected);
  expected.back() = values.words;
  checked(op, "v", v, ScalarType::Int, expected);

  BinaryAttentionParams p;
  const auto q_first = lengths ? first_rows(op, *lengths, q.size(0)) : first_rows(q.size(0), q.size(1));
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
  Rule{op, rule, scaling, beta}.apply(alpha_q, alpha_k, alpha_a, p);
  const Sizes ranges = {2, heads * p.e};
  const Tensor above = checked(op, "positive", positive, ScalarType::Int, ranges);
  const auto below = checked(op, "negative", negative, ScalarType::Int, ranges);
  std::optional<MaskView> attended;
  if (mask) {
    attended = mask_view(op, *mask, {sequences, heads, p.n, p.m});
    p.mask = attended->mask;
  }
  Sizes plane = sizes_of(q);
  plane.back() = values.words;
  const Tensor sign = new_tensor(plane, ScalarType::Int);
  const Tensor nonzero = new_tensor(below ? plane : Sizes{0}, ScalarType::Int);
  p.bits.heads = heads;
  p.bits.q = queries.rows();
  p.bits.k = keys.rows();
  p.bits.v = values.rows();
  p.bits.q_first = q_first.data();
  p.bits.k_first = k_first.data();
  p.bits.out = {mutable_data<int32_t>(sign), below ? mutable_data<int32_t>(nonzero) : nullptr, data<int32_t>(above),
                data_or_null<int32_t>(below)};
  p.parallel_for = torch_parallel_for;
  require(op, binary_attention(p));
  return {sign, nonzero};
}

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) {
  m.impl("binary_attention", BITMILL_BOX(bitmill::binary_attention_cpu));
  m.impl("binary_attention_bits", BITMILL_BOX(bitmill::binary_attention_bits_cpu));
}

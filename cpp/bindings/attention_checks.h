// SPDX-License-Identifier: Apache-2.0
// What the ops of binary attention ask of their arguments, beyond checks.h: rules, masks, views, lengths.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binary_attention.h"
#include "checks.h"

namespace bitmill {

inline AttentionRule rule_of(const char* op, const std::string& rule) {
  if (rule == "bool") return AttentionRule::bool_;
  if (rule == "softmax_aware") return AttentionRule::softmax_aware;
  if (rule == "elastic") return AttentionRule::elastic;
  fail(op, ": rule must be \"bool\", \"softmax_aware\" or \"elastic\", got \"", rule, "\"");
}

// A tensor of matrices [..., rows, columns], without moving it; `offset` has an entry a matrix.
struct View {
  Matrices matrices;
  std::vector<int64_t> offset;
};

// `leading` sizes of t, and their strides.
inline std::vector<int64_t> offsets(const Sizes& sizes, const Sizes& strides) {
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

inline Sizes strides_of(const Tensor& t) {
  const auto strides = t.strides();
  return {strides.begin(), strides.end()};
}

inline Sizes without_last_two(Sizes sizes) {
  sizes.resize(sizes.size() - 2);
  return sizes;
}

inline View view_of(const Tensor& t) {
  const Sizes strides = strides_of(t);
  View view{{}, offsets(without_last_two(sizes_of(t)), without_last_two(strides))};
  view.matrices = {t.const_data_ptr(), view.offset.data(), strides[strides.size() - 2], strides.back()};
  return view;
}

// [..., n, e] in the memory of [first, n, ..., e]: heads beside each other, so merging them copies nothing.
template <class Call>
Tensor new_context(const Call& call, const Sizes& leading, int64_t n, int64_t e, ScalarType dtype) {
  Sizes sizes = leading;
  sizes.insert(sizes.end(), {n, e});
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (leading.size() >= 2) std::rotate(order.begin() + 1, order.end() - 2, order.end() - 1);
  return call.new_tensor(sizes, strides_of(sizes, order), dtype);
}

// A mask broadcast to [..., n, m]: which of its matrices each of the batch reads, and their places.
struct MaskView {
  Sizes sizes, strides;  // of as many dimensions as the scores; 1 where one entry serves all
  std::vector<int64_t> offset, of;
  AttentionMask mask;
};

template <class Call>
MaskView broadcast_view(const Call& call, const char* op, const char* name, const Tensor& t, const Sizes& scores) {
  call.check_device(name, t);
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

template <class Call>
MaskView mask_view(const Call& call, const char* op, const Tensor& t, const Sizes& scores) {
  MaskView view = broadcast_view(call, op, "mask", t, scores);
  view.mask.boolean = t.scalar_type() == ScalarType::Bool;
  if (!view.mask.boolean) view.mask.dtype = float_dtype(op, t, "mask must be bool, float32, bfloat16 or float16");
  return view;
}

inline float step_of(const std::optional<Tensor>& alpha) {
  const float value = *data<float>(*alpha);
  return value < kAttentionStepFloor ? kAttentionStepFloor : value;
}

// What the rule of the map needs, checked.
struct Rule {
  const char* op;
  std::string name;
  std::optional<double> scaling;
  double beta;

  template <class Call>
  void check_step(const Call& call, const char* step_name, const std::optional<Tensor>& step) const {
    if (step.has_value() != (name == "elastic")) {
      fail(op, ": ", step_name, " goes with rule \"elastic\" only, and is needed there; got rule \"", name, "\"");
    }
    call.checked(step_name, step, ScalarType::Float, {});
  }

  // All but the numbers that come of learned steps.
  template <class Call>
  void apply(const Call& call, const std::optional<Tensor>& alpha_q, const std::optional<Tensor>& alpha_k,
             const std::optional<Tensor>& alpha_a, BinaryAttentionParams& p) const {
    const float largest = std::numeric_limits<float>::max(), smallest = std::numeric_limits<float>::min();
    p.rule = rule_of(op, name);
    if (scaling && !(*scaling >= smallest && *scaling <= largest)) {
      fail(op, ": scaling must be a positive, finite float32, got ", *scaling);
    }
    if (!(beta > 0 && beta <= 1)) fail(op, ": beta must lie in (0, 1], got ", beta);
    check_step(call, "alpha_q", alpha_q);
    check_step(call, "alpha_k", alpha_k);
    check_step(call, "alpha_a", alpha_a);
    p.divide = !scaling;
    p.scale = static_cast<float>(scaling ? *scaling : root(p));
    p.gap = static_cast<float>(std::log(1 / beta));
  }

  // Those, of steps on the CPU.
  void read_steps(const std::optional<Tensor>& alpha_q, const std::optional<Tensor>& alpha_k,
                  const std::optional<Tensor>& alpha_a, BinaryAttentionParams& p) const {
    if (p.rule != AttentionRule::elastic) return;
    const double product = static_cast<double>(step_of(alpha_q)) * static_cast<double>(step_of(alpha_k));
    p.slope = scaling ? product * *scaling : product / root(p);
    p.threshold = static_cast<double>(step_of(alpha_a)) / 2;
  }

  static double root(const BinaryAttentionParams& p) { return std::sqrt(static_cast<double>(p.d)); }
};

// Where each sequence's rows begin: of `sequences` of n rows, or of these lengths; `of` names what has the rows.
inline std::vector<int64_t> first_rows(int64_t sequences, int64_t n) {
  std::vector<int64_t> first;
  for (int64_t i = 0; i <= sequences; ++i) first.push_back(i * n);
  return first;
}

template <class Call>
std::vector<int64_t> first_rows(const Call& call, const char* op, const Tensor& lengths, int64_t rows, const char* of) {
  if (lengths.dim() != 1) fail(op, ": lengths must have shape [sequences], got ", to_string(sizes_of(lengths)));
  const Tensor counts = call.on_host(call.checked("lengths", lengths, ScalarType::Long, sizes_of(lengths)));
  std::vector<int64_t> first = {0};
  for (int64_t i = 0; i < counts.size(0); ++i) {
    const int64_t length = data<int64_t>(counts)[i];
    if (length < 0 || length > rows - first.back()) {
      fail(op, ": lengths must be at least 0 and add up to the ", rows, " rows of ", of, ", got ", length, " at ", i);
    }
    first.push_back(first.back() + length);
  }
  if (first.back() != rows) fail(op, ": lengths must add up to the ", rows, " rows of ", of, ", got ", first.back());
  return first;
}

inline int64_t longest(const std::vector<int64_t>& first) {
  int64_t most = 0;
  for (size_t i = 1; i < first.size(); ++i) most = std::max(most, first[i] - first[i - 1]);
  return most;
}

}  // namespace bitmill

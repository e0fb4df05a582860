// SPDX-License-Identifier: Apache-2.0
// Binary attention against the rules written out in floats, on every instruction set this machine has and with the work
// split in parts, from buffers of exactly the needed size.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_problems.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "threads.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

// The context of one row, as the rules say, in double.
std::vector<float> expected(const BinaryAttentionParams& p, const Problem& problem, const FloatOperand& q,
                            const FloatOperand& k, const FloatOperand& v, const std::vector<float>& bias, int64_t b,
                            int64_t row) {
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  std::vector<double> score(p.m);
  double top = minus_infinity;
  for (int64_t j = 0; j < p.m; ++j) {
    int dot = 0;
    for (int64_t c = 0; c < p.d; ++c) dot += q.sign(b, row, c, problem.zeros) * k.sign(b, j, c, problem.zeros);
    const float added = bias[row * p.m + j];
    const float scaled = p.divide ? static_cast<float>(dot) / p.scale : static_cast<float>(dot) * p.scale;
    score[j] = p.rule == AttentionRule::elastic ? p.slope * dot + added : scaled + added;
    if (added <= kDropped) score[j] = minus_infinity;
    top = std::max(top, score[j]);
  }
  double sum = 0;
  for (int64_t j = 0; j < p.m; ++j) sum += std::exp(score[j] - top);
  std::vector<float> context(p.e);
  float added_values = 0;
  const float* value_addend = static_cast<const float*>(p.value_addend.data);
  for (int64_t j = 0; j < p.m; ++j) {
    if (score[j] == minus_infinity) continue;
    bool active = score[j] > 0;
    if (p.rule == AttentionRule::softmax_aware) active = score[j] >= static_cast<float>(top) - p.gap;
    if (p.rule == AttentionRule::elastic) active = std::exp(score[j] - top) / sum > p.threshold;
    for (int64_t c = 0; active && c < p.e; ++c) context[c] += v.sign(b, j, c, problem.zeros);
    if (active && value_addend) added_values += value_addend[p.value_addend.offset[b] + j * p.value_addend.row_stride];
  }
  for (float& value : context) value = p.step * value + p.addend_step * added_values;
  return context;
}

void attends(const Problem& problem) {
  AttentionCase c(problem);
  BinaryAttentionParams& p = c.p;
  std::vector<float>& out = c.out;
  std::vector<float> want(out.size());
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t row = 0; row < p.n; ++row) {
      const std::vector<float> context = expected(p, problem, c.q, c.k, c.v, c.bias, b, row);
      std::copy(context.begin(), context.end(), want.begin() + c.offset[b] + row * p.out_row_stride);
    }
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    for (const ParallelFor parallel : {serial_for, scattered_for}) {
      p.parallel_for = parallel;
      std::fill(out.begin(), out.end(), NAN);
      CHECK(binary_attention(p) == Status::ok && out == want);
    }
  }
  select(best());
}

// Sequences of these lengths, from bits to bits, against the same computed one by one from floats to floats.
void attends_bits(const std::vector<int64_t>& lengths, int64_t heads, int64_t d, int64_t e, AttentionRule rule,
                  bool zeros) {
  const int64_t sequences = static_cast<int64_t>(lengths.size()), columns = heads * e;
  std::vector<int64_t> first = {0};
  for (const int64_t length : lengths) first.push_back(first.back() + length);
  const int64_t rows = first.back();
  const PackedOperand q(rows, heads, d, zeros), k(rows, heads, d, zeros), v(rows, heads, e, zeros);
  std::vector<int32_t> positive(2 * columns), negative(2 * columns);
  for (int64_t c = 0; c < columns; ++c) {  // one range each, the negative one below
    positive[c] = static_cast<int32_t>(random_bits() % 5) - 2;
    positive[columns + c] = c % 3 ? 1 << 24 : positive[c] + 2;
    negative[c] = -(1 << 24);
    negative[columns + c] = positive[c] - 2;
  }
  std::vector<int32_t> sign(rows * columns / 32), nonzero(sign.size());
  BinaryAttentionParams p;
  p.d = d;
  p.e = e;
  p.rule = rule;
  p.scale = std::sqrt(static_cast<float>(d));
  p.divide = true;
  p.gap = std::log(1 / kBeta);
  p.slope = 0.83 / std::sqrt(static_cast<double>(d));
  p.threshold = 0.05;
  for (int64_t i = 0; i < sequences * heads; ++i) {
    const int64_t start = first[i / heads], n = lengths[i / heads], head = i % heads, zero = 0;
    std::vector<float> context(n * e);
    BinaryAttentionParams alone = p;
    alone.batch = 1;
    alone.n = alone.m = n;
    alone.q = {q.values.data() + (head * rows + start) * d, &zero, d, 1};
    alone.k = {k.values.data() + (head * rows + start) * d, &zero, d, 1};
    alone.v = {v.values.data() + (head * rows + start) * e, &zero, e, 1};
    alone.out = context.data();
    alone.out_offset = &zero;
    alone.out_row_stride = e;
    CHECK(binary_attention(alone) == Status::ok);
    for (int64_t j = 0; j < n * e; ++j) {
      const int64_t c = head * e + j % e, word = (start + j / e) * columns / 32 + c / 32;
      const int32_t whole = static_cast<int32_t>(context[j]);
      const bool above = positive[c] <= whole && whole <= positive[columns + c], below = whole <= negative[columns + c];
      sign[word] |= static_cast<int32_t>(static_cast<uint32_t>(above) << (c % 32));
      nonzero[word] |= static_cast<int32_t>(static_cast<uint32_t>(above || below) << (c % 32));
    }
  }
  p.batch = sequences * heads;
  p.n = p.m = *std::max_element(lengths.begin(), lengths.end());
  p.bits.heads = heads;
  p.bits.q = q.rows;
  p.bits.k = k.rows;
  p.bits.v = v.rows;
  p.bits.q_first = p.bits.k_first = first.data();
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    for (const ParallelFor parallel : {serial_for, scattered_for}) {
      p.parallel_for = parallel;
      std::vector<int32_t> got(sign.size(), -1), present(sign.size(), -1);
      p.bits.out = {got.data(), present.data(), positive.data(), negative.data()};
      CHECK(binary_attention(p) == Status::ok && got == sign && present == nonzero);
      std::fill(got.begin(), got.end(), -1);
      p.bits.out = {got.data(), nullptr, positive.data(), nullptr};
      CHECK(binary_attention(p) == Status::ok && got == sign);
    }
  }
  select(best());
}

// Values that nothing may trip over: NaN and infinities everywhere, on every set the same.
void survives_special_values() {
  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, 3e38f, -1.0f};
  std::vector<float> x(40 * 40);
  for (float& value : x) value = special[random_bits() % 8];
  const int64_t zero = 0;
  BinaryAttentionParams p;
  p.batch = 1;
  p.n = p.m = p.d = p.e = 40;
  p.q = p.k = p.v = {x.data(), &zero, 40, 1};
  p.mask = {p.q, 1, 40, false, Dtype::f32, &zero};
  p.out_offset = &zero;
  p.out_row_stride = 40;
  for (const AttentionRule rule : {AttentionRule::bool_, AttentionRule::softmax_aware, AttentionRule::elastic}) {
    for (const double slope : {0.1, 1e300, std::numeric_limits<double>::quiet_NaN()}) {
      for (const int64_t masks : {0, 1}) {
        p.rule = rule;
        p.slope = slope;
        p.threshold = slope;
        p.mask.count = masks;
        std::vector<float> first;
        for (const InstructionSet set : kInstructionSets) {
          if (!select(set)) continue;
          std::vector<float> out(40 * 40, NAN);
          p.out = out.data();
          CHECK(binary_attention(p) == Status::ok);
          if (first.empty()) first = out;
          CHECK(out == first);
        }
      }
    }
  }
  select(best());
}

}  // namespace

int main() {
  for (const AttentionRule rule : {AttentionRule::bool_, AttentionRule::softmax_aware, AttentionRule::elastic}) {
    for (const bool zeros : {false, true}) {
      attends_bits({1}, 1, 32, 32, rule, zeros);
      attends_bits({5, 0, 70, 33, 1}, 3, 64, 32, rule, zeros);
      attends_bits({37, 37}, 2, 96, 160, rule, zeros);
      attends_bits({0}, 2, 32, 32, rule, zeros);
    }
  }
  for_each_attention(attends);
  survives_special_values();
  BinaryAttentionParams p;
  CHECK(binary_attention(p) == Status::bad_argument);  // d = 0
  p.d = -1;
  CHECK(binary_attention(p) == Status::bad_size);
  p.d = kMaxColumns + 1;
  CHECK(binary_attention(p) == Status::bad_size);
  p.d = 1;
  CHECK(binary_attention(p) == Status::ok);  // an empty batch
  p.scale = INFINITY;
  CHECK(binary_attention(p) == Status::bad_argument);
  return bitmill_test::failures() != 0;
}

// SPDX-License-Identifier: Apache-2.0
// Binary attention against the rules written out in floats, on every instruction set this machine has and with the work
// split in parts, from buffers of exactly the needed size.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "binary_attention.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"

using namespace bitmill;

namespace {

std::mt19937 random_bits(3);

// Parts of one item, last to first: a result must not depend on who computes what, or when.
void scattered_for(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  for (int64_t i = end; i > begin; --i) body(context, i - 1, i);
}

float random_float(bool zeros) {
  if (zeros && random_bits() % 5 == 0) return 0.0f;
  return static_cast<float>(static_cast<int32_t>(random_bits() | 1)) / 1e9f;
}

// [batch, rows, columns] floats, contiguous or with columns far apart.
struct Operand {
  std::vector<float> values;
  std::vector<int64_t> offset;
  Matrices matrices;
  int64_t rows, columns;

  Operand(int64_t batch, int64_t rows_, int64_t columns_, bool zeros, bool transposed)
      : rows(rows_), columns(columns_) {
    values.resize(batch * rows * columns);
    for (float& value : values) value = random_float(zeros);
    for (int64_t b = 0; b < batch; ++b) offset.push_back(b * rows * columns);
    matrices = {values.data(), offset.data(), transposed ? 1 : columns, transposed ? rows : 1};
  }
  float at(int64_t b, int64_t row, int64_t column) const {
    return values[offset[b] + row * matrices.row_stride + column * matrices.column_stride];
  }
  int sign(int64_t b, int64_t row, int64_t column, bool zeros) const {
    const float x = at(b, row, column);
    return x > 0 || (x == 0 && !zeros) ? 1 : x < 0 ? -1 : 0;
  }
};

struct Problem {
  int64_t batch, n, m, d, e;
  AttentionRule rule;
  bool zeros;      // sgn(0) = 0
  bool has_zeros;  // in q, k and v
  int mask;        // 0: none, 1: bool for all rows, 2: bool for each, 3: additive, 4: with a bias
  bool transposed;
};

constexpr float kBeta = 0.25f;

// The context of one row, as the rules say, in double.
std::vector<float> expected(const BinaryAttentionParams& p, const Problem& problem, const Operand& q, const Operand& k,
                            const Operand& v, const std::vector<float>& bias, int64_t b, int64_t row) {
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
  const auto [batch, n, m, d, e, rule, zeros, has_zeros, mask, transposed] = problem;
  const Operand q(batch, n, d, has_zeros, transposed), k(batch, m, d, has_zeros, transposed);
  const Operand v(batch, m, e, has_zeros, transposed);
  std::vector<float> bias(n * m), floats(n * m), out(batch * n * e);
  std::vector<uint8_t> keep(n * m);
  for (int64_t i = 0; i < n * m; ++i) {
    const bool dropped = mask > 0 && (mask == 1 && i >= m ? keep[i % m] == 0 : random_bits() % 3 == 0 || i / m == 4);
    keep[i] = !dropped;
    bias[i] = floats[i] = dropped ? -2e4f : mask == 4 ? random_float(false) : 0.0f;
  }
  std::vector<int64_t> offset(batch), zero_offset(1), of(batch), addend_offset(batch);
  for (int64_t b = 0; b < batch; ++b) offset[b] = b * e;  // rows of all matrices side by side
  std::iota(addend_offset.begin(), addend_offset.end(), int64_t{0});
  BinaryAttentionParams p;
  p.batch = batch;
  p.n = n;
  p.m = m;
  p.d = d;
  p.e = e;
  p.q = q.matrices;
  p.k = k.matrices;
  p.v = v.matrices;
  p.zeros = zeros;
  if (mask > 0) {
    p.mask.boolean = mask <= 2;
    p.mask.values = {p.mask.boolean ? static_cast<const void*>(keep.data()) : floats.data(), zero_offset.data(), m, 1};
    p.mask.count = 1;
    p.mask.rows = mask == 1 ? 1 : n;
    p.mask.of = of.data();
  }
  p.rule = rule;
  p.divide = random_bits() % 2 == 0;
  p.scale = std::sqrt(static_cast<float>(d));
  if (!p.divide) p.scale = 1 / p.scale;
  p.gap = std::log(1 / kBeta);
  p.slope = 0.83 / std::sqrt(static_cast<double>(d));
  p.threshold = 0.9 / static_cast<double>(m + 1);
  p.step = rule == AttentionRule::elastic ? 0.37f : 1.0f;
  std::vector<float> addend(batch * m);  // whole numbers: their sum is exact in every order
  for (float& value : addend) value = static_cast<float>(random_bits() % 100);
  if (rule == AttentionRule::elastic && transposed) {
    p.value_addend = {addend.data(), addend_offset.data(), batch, 1};
    p.addend_step = 0.7f;
  }
  p.out = out.data();
  p.out_offset = offset.data();
  p.out_row_stride = batch * e;
  std::vector<float> want(out.size());
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t row = 0; row < n; ++row) {
      const std::vector<float> context = expected(p, problem, q, k, v, bias, b, row);
      std::copy(context.begin(), context.end(), want.begin() + offset[b] + row * p.out_row_stride);
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

// Packed rows [rows, heads * columns / 32], and the floats that they stand for, [head][rows][columns].
struct PackedOperand {
  std::vector<int32_t> sign, nonzero;
  std::vector<float> values;
  AttentionRows rows;

  PackedOperand(int64_t count, int64_t heads, int64_t columns, bool zeros) {
    const int64_t words = heads * columns / 32;
    sign.resize(count * words);
    nonzero.resize(zeros ? sign.size() : 0);
    values.resize(32 * sign.size());
    for (int64_t i = 0; i < count * words; ++i) {
      const uint32_t present = zeros ? static_cast<uint32_t>(random_bits() | random_bits()) : ~0u;
      const uint32_t bits = static_cast<uint32_t>(random_bits()) & present;
      sign[i] = static_cast<int32_t>(bits);
      if (zeros) nonzero[i] = static_cast<int32_t>(present);
      for (int64_t bit = 0; bit < 32; ++bit) {
        const int64_t column = i % words * 32 + bit, head = column / columns;
        const int value = (present >> bit & 1u) == 0 ? 0 : (bits >> bit & 1u) ? 1 : -1;
        values[(head * count + i / words) * columns + column % columns] = static_cast<float>(value);
      }
    }
    rows = {heads * columns / 32, sign.data(), zeros ? nonzero.data() : nullptr};
  }
};

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
  const int64_t shapes[][5] = {{1, 1, 1, 1, 1},    {2, 5, 33, 15, 9},    {1, 37, 64, 32, 64}, {3, 6, 31, 64, 17},
                               {2, 4, 97, 65, 80}, {1, 2, 200, 100, 33}, {2, 0, 5, 7, 3},     {2, 5, 0, 7, 3},
                               {2, 5, 7, 7, 0},    {0, 5, 7, 7, 3},      {1, 3, 16, 130, 130}};
  for (const auto& shape : shapes) {
    for (const AttentionRule rule : {AttentionRule::bool_, AttentionRule::softmax_aware, AttentionRule::elastic}) {
      for (int mask = 0; mask < 5; ++mask) {
        for (const int options : {0, 1, 2, 3, 5}) {
          const auto [batch, n, m, d, e] = shape;
          attends({batch, n, m, d, e, rule, (options & 1) != 0, (options & 2) != 0, mask, (options & 4) != 0});
        }
      }
    }
  }
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

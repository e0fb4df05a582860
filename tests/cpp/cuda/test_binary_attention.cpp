// SPDX-License-Identifier: Apache-2.0
// The kernels of binary attention against core's plain form, over its problems: floats and bits are equal.
#include <algorithm>

#include "../attention_problems.h"
#include "../check.h"
#include "cpu.h"
#include "cuda_runtime.h"
#include "launchers.h"

using namespace bitmill_test;

namespace {

Status launch(const BinaryAttentionParams& p, const cuda::AttentionSteps& steps = {}) {
  std::vector<int32_t> scratch(cuda::binary_attention_scratch(p), -1);
  return cuda::launch_binary_attention(p, scratch.data(), nullptr, steps);
}

void attends(const Problem& problem) {
  AttentionCase c(problem);
  std::fill(c.out.begin(), c.out.end(), NAN);
  CHECK(binary_attention(c.p) == Status::ok);
  const std::vector<float> want = c.out;
  std::fill(c.out.begin(), c.out.end(), NAN);
  CHECK(launch(c.p) == Status::ok && c.out == want);
}

// Half-precision operands, a row of bias for all queries, and sums whose order shows.
template <class T>
void attends_halves(Dtype dtype, AttentionRule rule) {
  constexpr int64_t batch = 4, n = 19, m = 300, d = 40, e = 70;
  std::vector<T> x(batch * (n + m) * d + batch * m * e), out(batch * n * e), want(out.size());
  std::vector<T> mask(2 * m);
  for (auto* values : {&x, &mask}) {
    for (T& value : *values) store(random_float(true), &value);
  }
  std::vector<float> addend(batch * m);
  for (float& value : addend) value = random_float(false);
  std::vector<int64_t> q_offset, k_offset, v_offset, out_offset, mask_offset = {0, m}, of, addend_offset;
  for (int64_t b = 0; b < batch; ++b) {  // heads beside each other, two sequences of two
    q_offset.push_back(b / 2 * 2 * n * d + b % 2 * d);
    k_offset.push_back(b * m * d);
    v_offset.push_back(b * m * e);
    out_offset.push_back(b * n * e);
    addend_offset.push_back(b * m);
    of.push_back(b / 2);
  }
  BinaryAttentionParams p;
  p.batch = batch, p.n = n, p.m = m, p.d = d, p.e = e;
  p.dtype = dtype;
  p.q = {x.data(), q_offset.data(), 2 * d, 1};
  p.k = {x.data() + batch * n * d, k_offset.data(), d, 1};
  p.v = {x.data() + batch * (n + m) * d, v_offset.data(), e, 1};
  p.mask = {{mask.data(), mask_offset.data(), m, 1}, 2, 1, false, dtype, of.data()};
  p.rule = rule;
  p.scale = std::sqrt(static_cast<float>(d));
  p.divide = true;
  p.gap = 1.5f;
  if (rule == AttentionRule::elastic) {
    p.value_addend = {addend.data(), addend_offset.data(), 1, 1};
    p.addend_step = 0.02f;
  }
  p.slope = static_cast<double>(0.9f) * static_cast<double>(0.4f) / std::sqrt(static_cast<double>(d));
  p.threshold = static_cast<double>(0.02f) / 2;
  p.step = rule == AttentionRule::elastic ? 0.02f * 0.7f : 1.0f;
  p.out_offset = out_offset.data();
  p.out_row_stride = e;
  p.out = want.data();
  CHECK(binary_attention(p) == Status::ok);
  const auto equal = [&] { return std::memcmp(out.data(), want.data(), out.size() * sizeof(T)) == 0; };
  p.out = out.data();
  CHECK(launch(p) == Status::ok && equal());
  if (rule != AttentionRule::elastic) return;
  std::fill(out.begin(), out.end(), T{});  // the same from learned steps
  const float q = 0.9f, k = 0.4f, a = 0.02f, v = 0.7f;
  p.slope = p.threshold = p.step = p.addend_step = NAN;
  CHECK(launch(p, {&q, &k, &a, &v, std::sqrt(static_cast<double>(d)), true}) == Status::ok && equal());
}

// From bits to bits.
void attends_bits(const std::vector<int64_t>& n_of, const std::vector<int64_t>& m_of, int64_t heads, int64_t d,
                  int64_t e, AttentionRule rule, bool zeros) {
  std::vector<int64_t> q_first = {0}, k_first = {0};
  for (const int64_t n : n_of) q_first.push_back(q_first.back() + n);
  for (const int64_t m : m_of) k_first.push_back(k_first.back() + m);
  const PackedOperand q(q_first.back(), heads, d, zeros), k(k_first.back(), heads, d, zeros);
  const PackedOperand v(k_first.back(), heads, e, zeros);
  const int64_t columns = heads * e;
  std::vector<int32_t> positive(2 * columns), negative(2 * columns);
  for (int64_t c = 0; c < columns; ++c) {
    positive[c] = static_cast<int32_t>(random_bits() % 5) - 2;
    positive[columns + c] = c % 3 ? 1 << 24 : positive[c] + 2;
    negative[c] = -(1 << 24);
    negative[columns + c] = positive[c] - 2;
  }
  std::vector<int32_t> out[4];
  for (auto& plane : out) plane.assign(q_first.back() * columns / 32, -1);
  BinaryAttentionParams p;
  p.batch = std::ssize(n_of) * heads, p.d = d, p.e = e;
  p.n = *std::max_element(n_of.begin(), n_of.end());
  p.m = *std::max_element(m_of.begin(), m_of.end());
  p.rule = rule;
  p.scale = std::sqrt(static_cast<float>(d));
  p.divide = true;
  p.gap = 1.3f;
  p.slope = 0.83 / std::sqrt(static_cast<double>(d));
  p.threshold = 0.05;
  p.bits.heads = heads;
  p.bits.q = q.rows;
  p.bits.k = k.rows;
  p.bits.v = v.rows;
  p.bits.q_first = q_first.data();
  p.bits.k_first = k_first.data();
  for (const bool ternary : {true, false}) {
    const auto to = [&](int plane) {
      return BitOutput{out[plane].data(), ternary ? out[plane + 1].data() : nullptr, positive.data(),
                       ternary ? negative.data() : nullptr};
    };
    p.bits.out = to(0);
    CHECK(binary_attention(p) == Status::ok);
    p.bits.out = to(2);
    CHECK(launch(p) == Status::ok);
    CHECK(out[0] == out[2] && out[1] == out[3]);
  }
}

}  // namespace

int main() {
  select(InstructionSet::generic);
  int number = 0;
  for_each_attention([&](const Problem& problem) {
    emulation::last_to_first = ++number % 2 == 0;
    attends(problem);
  });
  attends({1, 17, 1100, 64, 65, AttentionRule::softmax_aware, true, true, 2, false});  // more than a chunk of the map
  for (const AttentionRule rule : {AttentionRule::bool_, AttentionRule::softmax_aware, AttentionRule::elastic}) {
    attends_halves<float>(Dtype::f32, rule);
    attends_halves<BFloat16>(Dtype::bf16, rule);
    attends_halves<Float16>(Dtype::f16, rule);
    for (const bool zeros : {false, true}) {
      attends_bits({1}, {1}, 1, 32, 32, rule, zeros);
      attends_bits({37, 37}, {37, 37}, 2, 96, 160, rule, zeros);
      attends_bits({5, 5, 5}, {70, 70, 70}, 3, 64, 32, rule, zeros);
      attends_bits({5, 0, 20}, {5, 0, 33}, 3, 64, 32, rule, zeros);
    }
  }
  BinaryAttentionParams p;
  CHECK(launch(p) == Status::bad_argument);  // d = 0
  p.d = 1;
  CHECK(launch(p) == Status::ok);  // an empty batch
  const int64_t uneven[] = {0, 5, 7, 20};
  p.batch = 4, p.n = p.m = p.e = 1;
  p.q = p.k = p.v = {nullptr, uneven, 1, 1};
  CHECK(launch(p) == Status::bad_argument);
  return failures() != 0;
}

// SPDX-License-Identifier: Apache-2.0
// A prompt's attention against sums in double precision, each instruction set against the generic form, in parts.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "prompt_attention.h"
#include "threads.h"

using namespace bitmill;
using bitmill_test::scattered_for;

namespace {

std::mt19937 random_bits(5);

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f;
  return values;
}

struct Problem {
  int64_t m, heads, key_heads, d, position, capacity;
  float scaling;
  std::vector<float> rows, cos, sin, keys, values;

  Problem(int64_t m, int64_t heads, int64_t key_heads, int64_t d, int64_t position, int64_t capacity, float scaling)
      : m(m), heads(heads), key_heads(key_heads), d(d), position(position), capacity(capacity), scaling(scaling) {
    rows = random_floats(m * (heads + 2 * key_heads) * d);
    cos = random_floats(m * d), sin = random_floats(m * d);
    keys = random_floats(key_heads * capacity * d), values = random_floats(key_heads * capacity * d);
  }
};

struct Result {
  std::vector<float> out, keys, values;

  bool operator==(const Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(out, other.out) && same(keys, other.keys) && same(values, other.values);
  }
};

Result run(const Problem& c, ParallelFor parallel_for = serial_for) {
  Result r{std::vector<float>(static_cast<size_t>(c.m * c.heads * c.d)), c.keys, c.values};
  PromptAttentionParams p;
  p.rows = c.rows.data();
  p.cos = c.cos.data();
  p.sin = c.sin.data();
  p.keys = r.keys.data();
  p.values = r.values.data();
  p.m = c.m;
  p.heads = c.heads;
  p.key_heads = c.key_heads;
  p.d = c.d;
  p.capacity = c.capacity;
  p.position = c.position;
  p.scaling = c.scaling;
  p.out = r.out.data();
  p.parallel_for = parallel_for;
  CHECK(prompt_attention(p) == Status::ok);
  return r;
}

void equals_every_instruction_set(const Problem& c, const Result& want) {
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    CHECK(run(c) == want && run(c, scattered_for) == want);
  }
  select(best());
}

void attends(const Problem& c) {
  select(InstructionSet::generic);
  const Result want = run(c);
  const int64_t d = c.d, width = (c.heads + 2 * c.key_heads) * d;
  for (int64_t row = 0; row < c.m; ++row) {
    const float *cos = c.cos.data() + row * d, *sin = c.sin.data() + row * d;
    const auto turned = [&](int64_t head, int64_t i) {
      const float* x = c.rows.data() + row * width + head * d;
      const double other = i < d / 2 ? -static_cast<double>(x[i + d / 2]) : static_cast<double>(x[i - d / 2]);
      return static_cast<double>(x[i]) * cos[i] + other * sin[i];
    };
    for (int64_t head = 0; head < c.heads; ++head) {
      const int64_t key_head = head / (c.heads / c.key_heads), at = key_head * c.capacity * d;
      const int64_t now = at + (c.position + row) * d;
      std::vector<double> weights;
      double total = 0;
      for (int64_t t = 0; t <= c.position + row; ++t) {
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += turned(head, i) * want.keys[at + t * d + i];
        weights.push_back(std::exp(score * c.scaling));
        total += weights.back();
      }
      for (int64_t i = 0; i < d; ++i) {
        double context = 0;
        for (int64_t t = 0; t <= c.position + row; ++t) context += weights[t] / total * want.values[at + t * d + i];
        CHECK(std::fabs(context - want.out[(row * c.heads + head) * d + i]) < 1e-5);
        CHECK(std::fabs(want.keys[now + i] - turned(c.heads + key_head, i)) < 1e-6);
        CHECK(want.values[now + i] == c.rows[row * width + (c.heads + c.key_heads + key_head) * d + i]);
      }
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(c.keys.size()); ++i) {
    const int64_t token = i / d % c.capacity;
    if (token < c.position || token >= c.position + c.m) {
      CHECK(want.keys[i] == c.keys[i] && want.values[i] == c.values[i]);
    }
  }
  equals_every_instruction_set(c, want);
}

// A token's infinite values do not reach those before it.
void keeps_later_values_out() {
  Problem c(12, 2, 1, 16, 1, 20, 0.3f);
  for (int64_t i = 0; i < 16; ++i) c.rows[9 * 64 + 48 + i] = std::numeric_limits<float>::infinity();
  select(InstructionSet::generic);
  const Result want = run(c);
  for (int64_t i = 0; i < 9 * 32; ++i) CHECK(std::isfinite(want.out[i]));
  for (int64_t i = 9 * 32; i < 12 * 32; ++i) CHECK(std::isinf(want.out[i]));
  equals_every_instruction_set(c, want);
}

// Scores so far apart that weights become 0, and infinite ones, whose weights are not numbers.
void bears_large_scores() {
  Problem c(20, 2, 2, 8, 3, 23, 3e3f);
  select(InstructionSet::generic);
  const Result want = run(c);
  for (const float x : want.out) CHECK(std::isfinite(x));
  equals_every_instruction_set(c, want);
  c.scaling = std::numeric_limits<float>::infinity();
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    for (const float x : run(c).out) CHECK(std::isnan(x) || std::isfinite(x));
  }
  select(best());
}

}  // namespace

int main() {
  for (const int64_t d : {2, 6, 16, 32, 34, 64, 128}) {
    for (const int64_t m : {1, 2, 7, 8, 33, 70}) {
      attends({m, 1, 1, d, 0, m, 0.7f});
      attends({m, 6, 2, d, 5, m + 9, 0.7f});
    }
  }
  keeps_later_values_out();
  bears_large_scores();
  PromptAttentionParams bad;
  CHECK(prompt_attention(bad) == Status::ok);  // no tokens
  bad.m = 2;
  CHECK(prompt_attention(bad) == Status::bad_size);  // no capacity
  bad.capacity = 2;
  CHECK(prompt_attention(bad) == Status::ok);  // no heads
  bad.position = 1;
  CHECK(prompt_attention(bad) == Status::bad_size);
  bad.position = 0;
  bad.heads = 3;
  bad.d = 2;
  CHECK(prompt_attention(bad) == Status::bad_argument);
  bad.key_heads = 2;
  CHECK(prompt_attention(bad) == Status::bad_argument);
  bad.key_heads = 3;
  bad.d = 3;
  CHECK(prompt_attention(bad) == Status::bad_argument);
  return bitmill_test::failures() != 0;
}

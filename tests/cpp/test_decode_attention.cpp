// SPDX-License-Identifier: Apache-2.0
// One token's attention against sums in double precision, each instruction set against the generic form, in parts.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu.h"
#include "decode_attention.h"
#include "threads.h"

using namespace bitmill;
using bitmill_test::scattered_for;

namespace {

std::mt19937 random_bits(4);

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = static_cast<float>(static_cast<int32_t>(random_bits())) / 2e9f;
  return values;
}

struct Result {
  std::vector<float> out, keys, values;

  bool operator==(const Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(out, other.out) && same(keys, other.keys) && same(values, other.values);
  }
};

void attends(int64_t heads, int64_t key_heads, int64_t d, int64_t position, int64_t capacity) {
  const auto rows = random_floats((heads + 2 * key_heads) * d), cos = random_floats(d), sin = random_floats(d);
  const auto keys = random_floats(key_heads * capacity * d), values = random_floats(key_heads * capacity * d);
  const auto run = [&](ParallelFor parallel_for) {
    Result r{std::vector<float>(static_cast<size_t>(heads * d)), keys, values};
    DecodeAttentionParams p;
    p.rows = rows.data();
    p.cos = cos.data();
    p.sin = sin.data();
    p.keys = r.keys.data();
    p.values = r.values.data();
    p.heads = heads;
    p.key_heads = key_heads;
    p.d = d;
    p.capacity = capacity;
    p.position = position;
    p.scaling = 0.7f;
    p.out = r.out.data();
    p.parallel_for = parallel_for;
    CHECK(decode_attention(p) == Status::ok);
    return r;
  };
  select(InstructionSet::generic);
  const Result want = run(serial_for);
  const auto turned = [&](int64_t head, int64_t i) {
    const float* x = rows.data() + head * d;
    const double other = i < d / 2 ? -static_cast<double>(x[i + d / 2]) : static_cast<double>(x[i - d / 2]);
    return static_cast<double>(x[i]) * cos[i] + other * sin[i];
  };
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t key_head = head / (heads / key_heads);
    const int64_t at = key_head * capacity * d, now = at + position * d;
    std::vector<double> weights;
    double total = 0;
    for (int64_t t = 0; t <= position; ++t) {
      double score = 0;
      for (int64_t i = 0; i < d; ++i) score += turned(head, i) * want.keys[at + t * d + i];
      weights.push_back(std::exp(score * 0.7f));
      total += weights.back();
    }
    for (int64_t i = 0; i < d; ++i) {
      double context = 0;
      for (int64_t t = 0; t <= position; ++t) context += weights[t] / total * want.values[at + t * d + i];
      CHECK(std::fabs(context - want.out[head * d + i]) < 1e-5);
      CHECK(std::fabs(want.keys[now + i] - turned(heads + key_head, i)) < 1e-6);
      CHECK(want.values[now + i] == rows[(heads + key_heads + key_head) * d + i]);
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(keys.size()); ++i) {
    if (i / d % capacity != position) CHECK(want.keys[i] == keys[i] && want.values[i] == values[i]);
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    CHECK(run(serial_for) == want && run(scattered_for) == want);
  }
  select(best());
}

}  // namespace

int main() {
  for (const int64_t d : {2, 6, 16, 34, 64}) {
    for (const int64_t position : {0, 1, 17}) {
      attends(1, 1, d, position, position + 1);
      attends(6, 2, d, position, 20);
    }
  }
  DecodeAttentionParams bad;
  CHECK(decode_attention(bad) == Status::bad_size);  // no capacity
  bad.capacity = 1;
  CHECK(decode_attention(bad) == Status::ok);  // no heads
  bad.heads = 3;
  bad.d = 2;
  CHECK(decode_attention(bad) == Status::bad_argument);
  bad.key_heads = 2;
  CHECK(decode_attention(bad) == Status::bad_argument);
  bad.key_heads = 3;
  bad.d = 3;
  CHECK(decode_attention(bad) == Status::bad_argument);
  return bitmill_test::failures() != 0;
}

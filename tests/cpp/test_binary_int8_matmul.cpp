// SPDX-License-Identifier: Apache-2.0
// int8 activations times bits: every kernel that this machine can run, for few rows and for many, against the generic
// form bit for bit. Buffers end where the arrays end, so that the sanitizer sees a read past them.
#include <cmath>
#include <vector>

#include "binary_int8_matmul.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"

using namespace bitmill;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

// Numbers to be added to a product; NaN past n.
std::vector<float> random_addend(int64_t m, int64_t n) {
  std::vector<float> values(static_cast<size_t>(tile_count(n) * m * kTileRows));
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t place = static_cast<int64_t>(i), output = place / (m * kTileRows) * kTileRows + place % kTileRows;
    values[i] = output < n ? static_cast<float>(static_cast<int>(next())) * 1e-9f : NAN;
  }
  return values;
}

// `extreme`: all bits set, and all activations the largest, which is where sums of 16 bits would overflow first.
void compare(int64_t m, int64_t n, int64_t k, int64_t group_size, bool bias, bool extreme = false) {
  const int64_t words = word_count(k), groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  std::vector<int32_t> weight(static_cast<size_t>(tile_count(n) * words * kTileRows)), nonzero(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    const int64_t word = static_cast<int64_t>(i) / kTileRows % words, columns = k - 32 * word;
    const uint32_t inside = columns >= 32 ? ~0u : (1u << columns) - 1;
    weight[i] = static_cast<int32_t>((extreme ? ~0u : next()) & inside);
    const bool zeros = static_cast<int64_t>(i) / (words * kTileRows) % 3 == 0;  // only some tiles have any
    nonzero[i] = static_cast<int32_t>((zeros ? next() : ~0u) & inside);
  }
  std::vector<int8_t> q(static_cast<size_t>(m * k));
  for (int8_t& value : q) value = static_cast<int8_t>(extreme ? 127 : static_cast<int>(next() >> 8) % 255 - 127);
  std::vector<float> scale(static_cast<size_t>(n * groups)), rows(static_cast<size_t>(m)),
      offset(static_cast<size_t>(n));
  for (auto* values : {&scale, &rows, &offset}) {
    for (float& value : *values) value = static_cast<float>(static_cast<int>(next())) * 1e-9f;
  }
  std::vector<float> want(static_cast<size_t>(m * n)), got(want.size());
  BinaryInt8MatmulParams p;
  p.q = q.data();
  p.row_scale = rows.data();
  p.weight = weight.data();
  p.m = m;
  p.n = n;
  p.k = k;
  p.scale = scale.data();
  p.group_size = group_size;
  p.bias = bias ? offset.data() : nullptr;
  const std::vector<float> addend = random_addend(m, n);
  if (m % 2 == 1 || extreme) p.addend = {addend.data(), m};
  for (const int32_t* plane : {static_cast<const int32_t*>(nonzero.data()), static_cast<const int32_t*>(nullptr)}) {
    p.weight_nonzero = plane;
    p.out = want.data();
    detail::binary_int8_matmul_tiles_generic(p, 0, tile_count(n));
    p.out = got.data();
    for (const InstructionSet set : kInstructionSets) {
      if (!select(set)) continue;
      got.assign(got.size(), 0.0f);
      CHECK(binary_int8_matmul(p) == Status::ok);
      CHECK(got == want);
    }
  }
  select(best());
#ifdef BITMILL_AVX512
  if (k == 0 || !available(InstructionSet::avx512)) return;
  got.assign(got.size(), 0.0f);
  detail::binary_int8_matmul_tiles_avx512(p, 0, tile_count(n));
  CHECK(got == want);
  if (!has_int8_dot()) return;
  got.assign(got.size(), 0.0f);
  detail::binary_int8_matmul_tiles_avx512vnni(p, 0, tile_count(n));
  CHECK(got == want);
#endif
}

}  // namespace

int main() {
  for (const int64_t m : {1, 2, 3, 4, 5, 8, 13, 67}) {
    for (const int64_t n : {1, 16, 33, 64}) {
      for (const int64_t k : {0, 1, 31, 32, 63, 100, 511, 513, 1056}) {
        compare(m, n, k, 0, k % 2 == 0);
        if (k > 0) compare(m, n, k, k > 100 ? 96 : 32, k % 2 == 1);
      }
    }
  }
  compare(9, 100, 400, 0, true);
  compare(9, 100, 400, 0, true, true);
  compare(4, 36, 1056, 512, false, true);
  compare(5, 150, 1600, 544, true, true);
  BinaryInt8MatmulParams p;
  p.k = -1;
  CHECK(binary_int8_matmul(p) == Status::bad_size);
  p.k = 64;
  p.group_size = 31;
  CHECK(binary_int8_matmul(p) == Status::bad_argument);
  return bitmill_test::failures() != 0;
}

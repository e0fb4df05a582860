// SPDX-License-Identifier: Apache-2.0
// Rows of a table of bits: values from the definition, each instruction set against the generic form, bad ids. Rows of
// a table of floats added to them, alone and as steps.
#include <cstring>
#include <vector>

#include "add_rows.h"
#include "binary_embedding.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "row_steps.h"
#include "threads.h"

using namespace bitmill;
using bitmill_test::scattered_for;

namespace {

uint32_t noise(uint32_t i) { return (i + 1) * 2654435761u ^ (i >> 7) * 40503u; }

template <class T>
void looks_up(Dtype dtype, int64_t k, int64_t group_size, bool zeros) {
  const int64_t rows = 21, words = word_count(k), groups = group_size ? ceil_div(k, group_size) : 1;
  std::vector<int32_t> weight(static_cast<size_t>(tile_count(rows) * words * kTileRows)), nonzero(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    weight[i] = static_cast<int32_t>(noise(static_cast<uint32_t>(i)));
    nonzero[i] = static_cast<int32_t>(noise(static_cast<uint32_t>(i) + 77) | noise(static_cast<uint32_t>(i) + 99));
  }
  std::vector<T> scale(static_cast<size_t>(rows * groups));
  for (size_t i = 0; i < scale.size(); ++i) store(0.37f * static_cast<float>(i) - 2.0f, &scale[i]);
  const std::vector<int64_t> ids = {20, 0, 15, 16, 15};
  const auto run = [&] {
    std::vector<T> out(ids.size() * static_cast<size_t>(k));
    BinaryEmbeddingParams p;
    p.ids = ids.data();
    p.weight = weight.data();
    p.weight_nonzero = zeros ? nonzero.data() : nullptr;
    p.m = static_cast<int64_t>(ids.size());
    p.rows = rows;
    p.k = k;
    p.scale = scale.data();
    p.group_size = group_size;
    p.out = out.data();
    p.dtype = dtype;
    CHECK(binary_embedding(p) == Status::ok);
    return out;
  };
  select(InstructionSet::generic);
  const std::vector<T> want = run();
  for (size_t i = 0; i < ids.size(); ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t lane = (ids[i] / kTileRows * words + j / 32) * kTileRows + ids[i] % kTileRows;
      const auto bit = [&](const std::vector<int32_t>& plane) {
        return static_cast<uint32_t>(plane[static_cast<size_t>(lane)]) >> (j % 32) & 1u;
      };
      const float level = zeros && !bit(nonzero) ? 0.0f : bit(weight) ? 1.0f : -1.0f;
      const int64_t group = group_size ? j / group_size : 0;
      const float expected = to_float(scale[static_cast<size_t>(ids[i] * groups + group)]) * level;
      CHECK(to_float(want[i * static_cast<size_t>(k) + static_cast<size_t>(j)]) == expected);
    }
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    const std::vector<T> got = run();
    CHECK(got.empty() || std::memcmp(got.data(), want.data(), got.size() * sizeof(T)) == 0);
  }
  select(best());
}

void adds_rows(int64_t m, int64_t k, bool with_ids) {
  const int64_t words = word_count(k), rows = 21, added = 5, first = 3;
  std::vector<int32_t> weight(static_cast<size_t>(tile_count(rows) * words * kTileRows));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<int32_t>(noise(static_cast<uint32_t>(i)));
  std::vector<float> scale(static_cast<size_t>(rows), 0.75f), table(static_cast<size_t>(added * k));
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(noise(static_cast<uint32_t>(i)) % 999);
  std::vector<int64_t> ids, places;
  for (int64_t i = 0; i < m; ++i) ids.push_back(7 * i % rows), places.push_back(3 * i % added);
  std::vector<float> words_alone(static_cast<size_t>(m * k)), got(words_alone.size());
  BinaryEmbeddingParams p;
  p.ids = ids.data();
  p.weight = weight.data();
  p.m = m;
  p.rows = rows;
  p.k = k;
  p.scale = scale.data();
  p.out = words_alone.data();
  CHECK(binary_embedding(p) == Status::ok);
  AddRowsParams add;
  add.x = got.data();
  add.m = m;
  add.k = k;
  add.table = table.data();
  add.rows = added;
  add.ids = with_ids ? places.data() : nullptr;
  add.first = first;
  p.out = got.data();
  for (const ParallelFor parallel_for : {serial_for, scattered_for}) {
    p.parallel_for = add.parallel_for = parallel_for;
    for (const bool together : {false, true}) {
      const RowStep steps[] = {p, add};
      CHECK(together ? row_steps(steps) == Status::ok
                     : binary_embedding(p) == Status::ok && add_rows(add) == Status::ok);
      for (int64_t i = 0; i < m * k; ++i) {
        const int64_t row = with_ids ? places[static_cast<size_t>(i / k)] : (first + i / k) % added;
        const size_t at = static_cast<size_t>(i);
        CHECK(got[at] == words_alone[at] + table[static_cast<size_t>(row * k + i % k)]);
      }
    }
  }
}

}  // namespace

int main() {
  for (const int64_t m : {0, 1, 63, 64, 600}) {
    for (const int64_t k : {0, 1, 40}) adds_rows(m, k, false), adds_rows(m, k, true);
  }
  const int64_t places[] = {0, 3};
  float x[2] = {}, table[3] = {};
  AddRowsParams beyond;
  beyond.x = x;
  beyond.table = table;
  beyond.m = 2;
  beyond.k = 1;
  beyond.rows = 3;
  beyond.ids = places;
  CHECK(add_rows(beyond) == Status::bad_size);
  beyond.ids = nullptr;
  CHECK(add_rows(beyond) == Status::ok);
  beyond.first = -1;
  CHECK(add_rows(beyond) == Status::bad_size);
  for (const int64_t k : {0, 1, 16, 31, 32, 33, 64, 100}) {
    for (const int64_t group_size : {0, 32, 64}) {
      for (const bool zeros : {false, true}) {
        looks_up<float>(Dtype::f32, k, group_size, zeros);
        looks_up<BFloat16>(Dtype::bf16, k, group_size, zeros);
        looks_up<Float16>(Dtype::f16, k, group_size, zeros);
      }
    }
  }
  const int64_t outside[] = {0, 3};
  BinaryEmbeddingParams bad;
  bad.ids = outside;
  bad.m = 2;
  bad.rows = 3;
  CHECK(binary_embedding(bad) == Status::bad_size);
  bad.m = 0;
  bad.group_size = 33;
  CHECK(binary_embedding(bad) == Status::bad_argument);
  return bitmill_test::failures() != 0;
}

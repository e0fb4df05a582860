// SPDX-License-Identifier: Apache-2.0
// Packing against single values, on every instruction set this machine has, with buffers of exactly the needed size.
#include <cmath>
#include <vector>

#include "bitpack.h"
#include "check.h"
#include "cpu.h"
#include "layout.h"
#include "problems.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

bool bit_of(const std::vector<int32_t>& words, int64_t row, int64_t column, int64_t k) {
  return (static_cast<uint32_t>(words[row * word_count(k) + column / 32]) >> (column % 32)) & 1u;
}

struct Result {
  std::vector<int32_t> sign, nonzero, count;
  std::vector<float> mean;
};

template <class T>
Result pack(const std::vector<T>& x, Dtype dtype, int64_t m, int64_t k, int64_t stride, const float* shift,
            Levels levels) {
  const size_t plane = static_cast<size_t>(m * word_count(k));
  Result r{std::vector<int32_t>(plane, -1), std::vector<int32_t>(plane, -1), std::vector<int32_t>(m), {}};
  r.mean.resize(m);
  BitpackParams p;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.k = k;
  p.row_stride = stride;
  p.shift = shift;
  p.threshold = 0.25f;
  p.levels = levels;
  p.sign = r.sign.data();
  p.nonzero = levels == Levels::sign ? r.nonzero.data() : nullptr;
  p.count = r.count.data();
  p.mean = r.mean.data();
  CHECK(bitpack(p) == Status::ok);
  return r;
}

template <class T>
void packs(Dtype dtype, int64_t m, int64_t k, int64_t stride, bool shifted, Levels levels) {
  // The last row is not followed by its padding: reading past k is an overrun.
  const std::vector<T> x = random_rows<T>(m > 0 ? (m - 1) * stride + k : 0);
  std::vector<float> shift(k);
  for (float& value : shift) value = random_value();
  const float* row_shift = shifted ? shift.data() : nullptr;
  select(InstructionSet::generic);
  const Result want = pack(x, dtype, m, k, stride, row_shift, levels);
  for (int64_t row = 0; row < m; ++row) {
    int64_t count = 0;
    for (int64_t c = 0; c < k; ++c) {
      const float z = shifted ? to_float(x[row * stride + c]) + shift[c] : to_float(x[row * stride + c]);
      const bool sign = levels == Levels::sign ? z > 0 : levels == Levels::plus ? z >= 0 : z > 0.25f;
      const bool nonzero = z > 0 || z < 0;
      CHECK(bit_of(want.sign, row, c, k) == sign);
      CHECK(levels != Levels::sign || bit_of(want.nonzero, row, c, k) == nonzero);
      count += levels == Levels::sign ? nonzero : sign;
    }
    for (int64_t c = k; c < 32 * word_count(k); ++c) CHECK(!bit_of(want.sign, row, c, k));
    CHECK(want.count[row] == count);
  }
  for (const InstructionSet set : kInstructionSets) {
    if (!select(set)) continue;
    const Result got = pack(x, dtype, m, k, stride, row_shift, levels);
    CHECK(got.sign == want.sign && got.nonzero == want.nonzero && got.count == want.count);
    for (int64_t row = 0; row < m; ++row) {
      CHECK(got.mean[row] == want.mean[row] || (std::isnan(got.mean[row]) && std::isnan(want.mean[row])));
    }
  }
  select(best());
}

void tiles_round_trip(int64_t n, int64_t k, int bits) {
  std::vector<uint8_t> codes(n * k), back(n * k);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random_bits()) & ((1 << bits) - 1);
  std::vector<int32_t> tiles(tile_count(n) * word_count(k, bits) * kTileRows, -1);
  CHECK(tile_pack(codes.data(), n, k, bits, tiles.data()) == Status::ok);
  CHECK(tile_unpack(tiles.data(), n, k, bits, back.data()) == Status::ok);
  CHECK(codes == back);
  for (int64_t i = 0; i < static_cast<int64_t>(tiles.size()); ++i) {
    const int64_t lane = i % kTileRows, w = i / kTileRows % word_count(k, bits);
    const int64_t row = i / (kTileRows * word_count(k, bits)) * kTileRows + lane, v = values_per_word(bits);
    uint32_t want = 0;
    for (int64_t j = 0; row < n && j < v && v * w + j < k; ++j) {
      want |= static_cast<uint32_t>(codes[row * k + v * w + j]) << (bits * j);
    }
    CHECK(static_cast<uint32_t>(tiles[i]) == want);
  }
}

}  // namespace

int main() {
  for (const int64_t k : kWidths) {
    for (const Levels levels : {Levels::sign, Levels::plus, Levels::bool_}) {
      for (const bool shifted : {false, true}) {
        packs<float>(Dtype::f32, 3, k, k + 5, shifted, levels);
        packs<BFloat16>(Dtype::bf16, 2, k, k, shifted, levels);
        packs<Float16>(Dtype::f16, 2, k, k + 1, shifted, levels);
      }
    }
    for (const int bits : {1, 4, 8}) {
      for (const int64_t n : {0, 1, 15, 16, 17, 33}) tiles_round_trip(n, k, bits);
    }
  }
  const int32_t sign[] = {0b0110}, nonzero[] = {0b1010};
  int8_t values[4];
  CHECK(bitunpack(sign, nonzero, 1, 4, values) == Status::ok);
  CHECK(values[0] == 0 && values[1] == 1 && values[2] == 0 && values[3] == -1);
  CHECK(bitunpack(sign, nullptr, 1, 4, values) == Status::ok && values[0] == -1 && values[2] == 1);

  BitpackParams p;
  p.m = -1;
  CHECK(bitpack(p) == Status::bad_size);
  p.m = 1;
  p.k = kMaxColumns + 1;
  CHECK(bitpack(p) == Status::bad_size);
  p.k = 1;
  CHECK(bitpack(p) == Status::bad_argument);  // Levels::sign without a nonzero plane
  CHECK(tile_pack(nullptr, 1, 1, 3, nullptr) == Status::bad_argument);
  CHECK(tile_unpack(nullptr, -1, 1, 1, nullptr) == Status::bad_size);
  return bitmill_test::failures() != 0;
}

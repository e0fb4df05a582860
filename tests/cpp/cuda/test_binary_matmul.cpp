// SPDX-License-Identifier: Apache-2.0
// The kernels of products of bits, against core's plain form: integers, bits and floats are equal.
#include "../problems.h"
#include "binary_matmul.h"
#include "cpu.h"
#include "cuda_runtime.h"
#include "launchers.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

// A vector that begins at a multiple of 16 bytes, as every allocation on a GPU does, or one element past it.
struct Moved {
  std::vector<int32_t> values;
  const int32_t* data;
  Moved(const std::vector<int32_t>& source, bool off) : values(off ? 1 : 0) {
    values.insert(values.end(), source.begin(), source.end());
    data = values.data() + (off ? 1 : 0);
  }
};

template <class T, class Run>
void equal(const Run& run, size_t count, T*& output, BinaryMatmulParams& p) {
  std::vector<T> want(count), got(count, T{});
  output = want.data();
  CHECK(binary_matmul(p) == Status::ok);
  output = got.data();
  CHECK(run() == Status::ok);
  CHECK(got == want);
  output = nullptr;
}

void multiplies(const Problem& problem, bool off) {
  const auto [m, n, k, operand, weight_zeros, group_size] = problem;
  const std::vector<int8_t> a = random_levels(m * k, operand, operand == Operand::ternary);
  const std::vector<int8_t> w = random_levels(n * k, Operand::sign, weight_zeros);
  const Moved a_bits(rows_of(a, m, k, positive), off), a_nonzero(rows_of(a, m, k, present), off);
  const auto w_bits = tiles_of(w, n, k, positive), w_nonzero = tiles_of(w, n, k, present);
  const int64_t groups = group_size > 0 ? ceil_div(k, group_size) : 1;
  const std::vector<float> scale = random_scales(n * groups), bias = random_scales(n), row_scale = random_scales(m);
  const std::vector<float> residual = random_scales(m * n);
  const auto positive_range = random_dots(2 * n, k), negative_range = random_dots(2 * n, k),
             single = random_dots(3 * n, k);

  BinaryMatmulParams p;
  p.a = a_bits.data;
  p.a_nonzero = operand == Operand::ternary ? a_nonzero.data : nullptr;
  p.operand = operand;
  p.weight = w_bits.data();
  p.weight_nonzero = weight_zeros ? w_nonzero.data() : nullptr;
  p.m = m;
  p.n = n;
  p.k = k;
  const auto run = [&] { return cuda::launch_binary_matmul(p, nullptr); };
  equal(run, static_cast<size_t>(m * n), p.dot, p);

  if (m > 0) {
    const auto plane = static_cast<size_t>(m * word_count(n));
    for (const bool ternary : {false, true}) {
      std::vector<int32_t> want[2], got[2];
      for (int i = 0; i < 2; ++i) want[i].assign(plane, -1), got[i].assign(plane, -1);
      p.bits.positive = positive_range.data();
      p.bits.negative = ternary ? negative_range.data() : nullptr;
      p.bits.single = ternary ? single.data() : nullptr;
      p.bits.single_count = ternary ? 3 : 0;
      p.bits.sign = want[0].data();
      p.bits.nonzero = ternary ? want[1].data() : nullptr;
      CHECK(binary_matmul(p) == Status::ok);
      p.bits.sign = got[0].data();
      p.bits.nonzero = ternary ? got[1].data() : nullptr;
      CHECK(run() == Status::ok);
      CHECK(got[0] == want[0] && got[1] == want[1]);
    }
    p.bits = {};
  }

  p.scale = scale.data();
  p.group_size = group_size;
  const auto floats = [&]<class T>(Dtype dtype, T) {
    p.out_dtype = dtype;
    std::vector<T> want(m * n), got(m * n);
    p.out = want.data();
    CHECK(binary_matmul(p) == Status::ok);
    p.out = got.data();
    CHECK(run() == Status::ok);
    CHECK(std::equal(got.begin(), got.end(), want.begin()));
  };
  floats(Dtype::f32, float{});
  p.bias = bias.data();
  p.residual = residual.data();
  floats(Dtype::f32, float{});
  p.residual = nullptr;
  p.row_scale = row_scale.data();
  floats(Dtype::bf16, uint16_t{});
  floats(Dtype::f16, uint16_t{});
}

}  // namespace

int main() {
  select(InstructionSet::generic);
  for_each_product([](const Problem& problem) { multiplies(problem, false); });
  // Sizes around the blocks of the tensor cores' kernels, and more stages than are in flight.
  for (const bool off : {false, true}) {
    emulation::last_to_first = off;
    for (const Operand operand : {Operand::sign, Operand::ternary, Operand::bool_}) {
      multiplies({64, 64, 512, operand, false, 0}, off);
      multiplies({65, 70, 2700, operand, false, 0}, off);
      multiplies({17, 200, 1024, operand, false, 0}, off);
      multiplies({200, 300, 640, operand, false, 0}, off);  // more large blocks than multiprocessors
      multiplies({10, 33, 4200, operand, true, 128}, off);
    }
  }
  // Large enough for Hopper's kernel: partial blocks, a partial word, more stages than there are places for.
  for (const bool backwards : {false, true}) {
    emulation::last_to_first = backwards;
    multiplies({260, 300, 2150, Operand::sign, false, 0}, false);
    multiplies({130, 260, 6000, Operand::bool_, false, 0}, false);
  }
  emulation::compute_capability = 10;
  multiplies({40, 50, 200, Operand::sign, false, 0}, false);

  BinaryMatmulParams p;
  p.m = -1;
  CHECK(cuda::launch_binary_matmul(p, nullptr) == Status::bad_size);
  p.m = p.n = p.k = 1;
  CHECK(cuda::launch_binary_matmul(p, nullptr) == Status::bad_argument);  // neither integers nor floats are asked for
  int32_t dot = 0, tiles[kTileRows + 1] = {};
  p.dot = &dot;
  p.a = tiles;
  p.weight = tiles + 1;
  CHECK(cuda::launch_binary_matmul(p, nullptr) == Status::bad_argument);  // tiles that are not aligned
  return failures() != 0;
}

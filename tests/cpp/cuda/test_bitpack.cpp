// SPDX-License-Identifier: Apache-2.0
// The kernels that pack rows, against core's plain form.
#include "../problems.h"
#include "bitpack.h"
#include "cpu.h"
#include "cuda_runtime.h"
#include "launchers.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

struct Result {
  std::vector<int32_t> sign, nonzero, count;
  std::vector<float> mean;
};

template <class Pack>
Result pack(BitpackParams p, const Pack& run) {
  const size_t plane = static_cast<size_t>(p.m * word_count(p.k));
  Result r{std::vector<int32_t>(plane, -1), std::vector<int32_t>(plane, -1), std::vector<int32_t>(p.m), {}};
  r.mean.resize(p.m);
  p.sign = r.sign.data();
  p.nonzero = p.levels == Levels::sign ? r.nonzero.data() : nullptr;
  p.count = r.count.data();
  p.mean = r.mean.data();
  CHECK(run(p) == Status::ok);
  return r;
}

template <class T>
void packs(Dtype dtype, int64_t m, int64_t k, int64_t stride, bool shifted, Levels levels) {
  const std::vector<T> x = random_rows<T>(m > 0 ? (m - 1) * stride + k : 0);
  const std::vector<float> shift = random_rows<float>(k), alpha = {0.7f};
  BitpackParams p;
  p.x = x.data();
  p.dtype = dtype;
  p.m = m;
  p.k = k;
  p.row_stride = stride;
  p.shift = shifted ? shift.data() : nullptr;
  p.threshold = alpha[0] / 2;
  p.levels = levels;
  const Result want = pack(p, bitpack);
  p.threshold = 0.25f;
  const Result want_quarter = pack(p, bitpack);
  for (const bool backwards : {false, true}) {
    emulation::last_to_first = backwards;
    const auto equal = [](const Result& got, const Result& wanted) {
      CHECK(got.sign == wanted.sign && got.nonzero == wanted.nonzero && got.count == wanted.count);
      for (size_t row = 0; row < got.mean.size(); ++row) {
        CHECK(got.mean[row] == wanted.mean[row] || (std::isnan(got.mean[row]) && std::isnan(wanted.mean[row])));
      }
    };
    equal(pack(p, [&](const BitpackParams& q) { return cuda::launch_bitpack(q, nullptr, alpha.data()); }), want);
    equal(pack(p, [](const BitpackParams& q) { return cuda::launch_bitpack(q, nullptr); }), want_quarter);
  }
}

}  // namespace

int main() {
  select(InstructionSet::generic);
  std::vector<int64_t> widths(std::begin(kWidths), std::end(kWidths));
  widths.insert(widths.end(), {256, 768, 2048, 2049, 5000});  // a warp's rows and a block's
  for (const int64_t k : widths) {
    for (const Levels levels : {Levels::sign, Levels::plus, Levels::bool_}) {
      for (const bool shifted : {false, true}) {
        packs<float>(Dtype::f32, 3, k, k + 5, shifted, levels);
        packs<BFloat16>(Dtype::bf16, 9, k, k, shifted, levels);
        packs<Float16>(Dtype::f16, 2, k, k + 1, shifted, levels);
      }
    }
  }
  BitpackParams p;
  CHECK(cuda::launch_bitpack(p, nullptr) == Status::ok);
  p.m = -1;
  CHECK(cuda::launch_bitpack(p, nullptr) == Status::bad_size);
  p.m = p.k = 1;
  CHECK(cuda::launch_bitpack(p, nullptr) == Status::bad_argument);  // Levels::sign without a nonzero plane
  return failures() != 0;
}

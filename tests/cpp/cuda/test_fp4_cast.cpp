// SPDX-License-Identifier: Apache-2.0
// The kernels that cast to 4-bit floats and back, against core's plain form: codes, scales and values are equal.
#include <algorithm>
#include <cstring>

#include "../fp4_definition.h"
#include "../problems.h"
#include "codebook4.h"
#include "cpu.h"
#include "cuda_runtime.h"
#include "launchers.h"
#include "nvfp4.h"

using namespace bitmill;
using namespace bitmill_test;

namespace {

constexpr RandomStream kStream{0x123456789abcdef0, 0xfedcba9876543210};
constexpr int64_t kRows = 5;

// Rows of k columns, some way apart, that begin at a multiple of 16 bytes or one element past it.
template <class T>
struct Input {
  std::vector<T> values;
  const T* data;
  int64_t k, stride;
  Input(int64_t k_, bool off) : data(nullptr), k(k_), stride(off ? k_ + 3 : k_) {
    values = random_rows<T>(kRows * stride + 1);
    data = values.data() + (off ? 1 : 0);
  }
  void describe(auto& p, Dtype dtype) const {
    p.x = data;
    p.dtype = dtype;
    p.m = kRows;
    p.k = k;
    p.row_stride = stride;
  }
};

template <class T>
bool same(const std::vector<T>& got, const std::vector<T>& want) {
  return std::equal(got.begin(), got.end(), want.begin(), want.end(), [](T a, T b) {
    return (a != a && b != b) || std::memcmp(&a, &b, sizeof a) == 0;  // NaN has no one bit pattern; -0 has
  });
}

// What a function writes into `count` elements.
template <class T, class Run>
std::vector<T> written(size_t count, const Run& run) {
  std::vector<T> result(count);
  if (count > 0) std::memset(result.data(), 0x5A, count * sizeof(T));
  CHECK(run(result.data()) == Status::ok);
  return result;
}

template <class T>
void casts(Dtype dtype, int64_t k, bool off) {
  const Input<T> x(k, off);
  const auto bytes = static_cast<size_t>(kRows * ceil_div(k, 2));
  Fp4CastParams p;
  x.describe(p, dtype);
  p.random = kStream;
  for (const NamedFormat& named : kFormats) {
    p.format = named.format;
    for (const Rounding rounding : kRoundings) {
      p.rounding = rounding;
      for (const NanPolicy nan : {NanPolicy::max, NanPolicy::zero}) {
        p.nan = nan;
        const auto want = written<uint8_t>(bytes, [&](uint8_t* to) { return p.packed = to, fp4_cast(p); });
        const auto got =
            written<uint8_t>(bytes, [&](uint8_t* to) { return p.packed = to, cuda::launch_fp4_cast(p, nullptr); });
        CHECK(got == want);
      }
    }
    std::vector<uint8_t> packed(bytes);
    p.packed = packed.data();
    p.nan = NanPolicy::error;
    int32_t found = 7;
    CHECK(cuda::launch_fp4_cast(p, nullptr, &found) == fp4_cast(p));
    const auto uncast = [&](float* to) { return fp4_uncast(packed.data(), kRows, k, named.format, to); };
    const auto on_gpu = [&](float* to) {
      return cuda::launch_fp4_uncast(packed.data(), kRows, k, named.format, to, nullptr);
    };
    CHECK(same(written<float>(kRows * k, on_gpu), written<float>(kRows * k, uncast)));
  }
  for (const bool up : {false, true}) {
    const auto cast = [&](uint8_t* to) { return e8m0_cast(x.data, dtype, k, up, to); };
    const auto on_gpu = [&](uint8_t* to) { return cuda::launch_e8m0_cast(x.data, dtype, k, up, to, nullptr); };
    CHECK(written<uint8_t>(k, on_gpu) == written<uint8_t>(k, cast));
  }
}

template <class T>
void quantises_mxfp4(Dtype dtype, int64_t k, bool off) {
  const Input<T> x(k, off);
  Mxfp4QuantizeParams p;
  x.describe(p, dtype);
  p.random = kStream;
  const int64_t bytes = kRows * ceil_div(k, 2), blocks = kRows * ceil_div(k, kMxBlock);
  for (const ScaleRule rule : {ScaleRule::floor, ScaleRule::rceil, ScaleRule::ceil, ScaleRule::even}) {
    for (const Rounding rounding : kRoundings) {
      p.rule = rule;
      p.rounding = rounding;
      std::vector<uint8_t> packed(bytes), scale(blocks), want(bytes), want_scale(blocks);
      p.packed = want.data();
      p.scale = want_scale.data();
      CHECK(mxfp4_quantize(p) == Status::ok);
      p.packed = packed.data();
      p.scale = scale.data();
      CHECK(cuda::launch_mxfp4_quantize(p, nullptr) == Status::ok);
      CHECK(packed == want && scale == want_scale);
      const auto back = [&](float* to) { return mxfp4_dequantize(packed.data(), scale.data(), kRows, k, to); };
      const auto on_gpu = [&](float* to) {
        return cuda::launch_mxfp4_dequantize(packed.data(), scale.data(), kRows, k, to, nullptr);
      };
      CHECK(same(written<float>(kRows * k, on_gpu), written<float>(kRows * k, back)));
    }
  }
}

template <class T>
void quantises_nvfp4(Dtype dtype, int64_t k, bool off) {
  const Input<T> x(k, off);
  const float factors[] = {0.01f, 1e-38f, -1.0f, NAN};
  for (const float* global : {static_cast<const float*>(nullptr), factors, factors + 1, factors + 2, factors + 3}) {
    for (const Rounding rounding : kRoundings) {
      Nvfp4QuantizeParams p;
      x.describe(p, dtype);
      p.global_scale = global;
      p.rounding = rounding;
      p.random = kStream;
      const int64_t bytes = kRows * ceil_div(k, 2), blocks = kRows * ceil_div(k, kNvBlock);
      std::vector<uint8_t> packed(bytes), scale(blocks), want(bytes), want_scale(blocks);
      p.packed = want.data();
      p.scale = want_scale.data();
      CHECK(nvfp4_quantize(p) == Status::ok);
      p.packed = packed.data();
      p.scale = scale.data();
      CHECK(cuda::launch_nvfp4_quantize(p, nullptr) == Status::ok);
      CHECK(packed == want && scale == want_scale);
      Nvfp4DequantizeParams q{packed.data(), scale.data(), kRows, k, global};
      const auto back = [&](float* to) { return q.values = to, nvfp4_dequantize(q); };
      const auto on_gpu = [&](float* to) { return q.values = to, cuda::launch_nvfp4_dequantize(q, nullptr); };
      CHECK(same(written<float>(kRows * k, on_gpu), written<float>(kRows * k, back)));
    }
  }
}

template <class T>
void quantises_to_codebooks(Dtype dtype, int64_t k, bool off) {
  const Input<T> x(k, off);
  Fp4Table tables[4] = {kNf4, kBnbFp4, {}, fp4_table(kE3M0)};
  tables[3].value[3] = NAN;
  for (const Fp4Table& table : tables) {
    for (const int64_t group_size : {0, 8, 64}) {
      for (const bool stochastic : {false, true}) {
        Codebook4QuantizeParams p;
        x.describe(p, dtype);
        p.codebook = table.value;
        p.group_size = group_size;
        p.stochastic = stochastic;
        p.random = kStream;
        std::vector<uint8_t> packed(kRows * ceil_div(k, 2)), want(packed.size());
        std::vector<float> scale(kRows * p.groups()), want_scale(scale.size());
        p.packed = want.data();
        p.scale = want_scale.data();
        CHECK(codebook4_quantize(p) == Status::ok);
        p.packed = packed.data();
        p.scale = scale.data();
        CHECK(cuda::launch_codebook4_quantize(p, nullptr) == Status::ok);
        CHECK(packed == want && same(scale, want_scale));
        Codebook4DequantizeParams q{packed.data(), scale.data(), table.value, kRows, k, group_size};
        const auto back = [&](float* to) { return q.values = to, codebook4_dequantize(q); };
        const auto on_gpu = [&](float* to) { return q.values = to, cuda::launch_codebook4_dequantize(q, nullptr); };
        CHECK(same(written<float>(kRows * k, on_gpu), written<float>(kRows * k, back)));
      }
    }
  }
}

template <class T>
void all(Dtype dtype, int64_t k, bool off) {
  casts<T>(dtype, k, off);
  quantises_mxfp4<T>(dtype, k, off);
  quantises_nvfp4<T>(dtype, k, off);
  quantises_to_codebooks<T>(dtype, k, off);
}

// Every byte is a value of E8M0.
void uncasts_e8m0() {
  std::vector<uint8_t> bytes(256);
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  const auto uncast = [&](float* to) { return e8m0_uncast(bytes.data(), 255, to); };
  const auto on_gpu = [&](float* to) { return cuda::launch_e8m0_uncast(bytes.data(), 255, to, nullptr); };
  CHECK(same(written<float>(255, on_gpu), written<float>(255, uncast)));
}

// Every bfloat16, in rows wider than a block of threads has columns.
void casts_every_half() {
  constexpr int64_t m = 8, k = 8192;
  std::vector<uint16_t> x(m * k);
  for (int64_t i = 0; i < m * k; ++i) x[i] = static_cast<uint16_t>(i);
  Fp4CastParams p{.x = x.data(), .dtype = Dtype::bf16, .m = m, .k = k, .row_stride = k};
  const auto want = written<uint8_t>(m * k / 2, [&](uint8_t* to) { return p.packed = to, fp4_cast(p); });
  const auto got =
      written<uint8_t>(m * k / 2, [&](uint8_t* to) { return p.packed = to, cuda::launch_fp4_cast(p, nullptr); });
  CHECK(got == want);
}

}  // namespace

int main() {
  select(InstructionSet::generic);
  for (const bool off : {false, true}) {
    emulation::last_to_first = off;
    for (const int64_t k : {0, 1, 7, 15, 16, 17, 31, 33, 64, 100, 304}) {
      all<float>(Dtype::f32, k, off);
      all<BFloat16>(Dtype::bf16, k, off);
    }
    all<Float16>(Dtype::f16, 65, off);
    all<float>(Dtype::f32, 2056, off);
  }
  uncasts_e8m0();
  casts_every_half();
  Fp4CastParams p;
  p.m = -1;
  CHECK(cuda::launch_fp4_cast(p, nullptr) == Status::bad_size);
  Codebook4QuantizeParams q;
  q.group_size = 12;
  CHECK(cuda::launch_codebook4_quantize(q, nullptr) == Status::bad_argument);
  return failures() != 0;
}

// SPDX-License-Identifier: Apache-2.0
// The emulation itself: what is not waited for is not there, and fragments are where PTX's documentation puts them.
#include <numeric>

#include "../problems.h"
#include "device.cuh"
#include "launch.cuh"

using namespace bitmill;
using namespace bitmill_test;

namespace {

struct Shared {
  alignas(16) uint32_t words[64][4];
};

// Every thread copies 16 bytes and reads those of its mirror image, with or without waiting for the others.
__global__ void mirror_kernel(const uint32_t* from, uint32_t* to, bool waits, bool meets) {
  auto& shared = cuda::shared_memory<Shared>();
  const unsigned thread = threadIdx.x;
  cuda::copy_async<16>(shared.words[thread], from + 4 * thread, thread != 5);
  cuda::close_copies();
  if (waits) cuda::wait_for_copies<0>();
  if (meets) __syncthreads();
  to[thread] = shared.words[63 - thread][thread % 4];
}

bool mirrors(bool waits, bool meets) {
  std::vector<uint32_t> from(256), to(64), want(64);
  std::iota(from.begin(), from.end(), 1u);
  for (unsigned thread = 0; thread < 64; ++thread) {
    want[thread] = thread == 63 - 5 ? 0 : from[4 * (63 - thread) + thread % 4];
  }
  const auto* source = from.data();
  CHECK(cuda::launch(nullptr, mirror_kernel, 1, 64, sizeof(Shared), source, to.data(), waits, meets) == Status::ok);
  return to == want;
}

__global__ void lanes_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned odd = __ballot_sync(cuda::kAllLanes, lane % 2 == 1);
  const int swapped = __shfl_xor_sync(cuda::kAllLanes, lane, 3), below = __shfl_down_sync(cuda::kAllLanes, lane, 4);
  const int seventh = __shfl_sync(cuda::kAllLanes, lane, 7);
  out[threadIdx.x] =
      odd == 0xAAAAAAAAu && swapped == (lane ^ 3) && below == (lane < 28 ? lane + 4 : lane) && seventh == 7;
}

// One product of 16 rows and 8 columns; a [16, words], b [8, words], in words of 32 bits or of two halves.
template <class Sum, int words, class Multiply>
void fragment(const uint32_t* a, const uint32_t* b, Sum* sum, const Multiply& multiply) {
  const int group = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const uint32_t left[4] = {a[group * words + t], a[(group + 8) * words + t], a[group * words + t + 4],
                            a[(group + 8) * words + t + 4]};
  const uint32_t right[2] = {b[group * words + t], b[group * words + t + 4]};
  Sum part[4] = {1, 2, 3, 4};
  multiply(part, left, right);
  for (int i = 0; i < 4; ++i) sum[(group + i / 2 * 8) * 8 + 2 * t + i % 2] = part[i] - static_cast<Sum>(i + 1);
}

__global__ void bits_kernel(const uint32_t* a, const uint32_t* b, int32_t* sum) {
  fragment<int32_t, 8>(a, b, sum, [](auto&... operands) { cuda::multiply_bits(operands...); });
}
__global__ void int8_kernel(const uint32_t* a, const uint32_t* b, int32_t* sum) {
  fragment<int32_t, 8>(a, b, sum, [](auto&... operands) { cuda::multiply_int8(operands...); });
}
template <class Half>
__global__ void halves_kernel(const uint32_t* a, const uint32_t* b, float* sum) {
  fragment<float, 8>(a, b, sum, [](auto&... operands) { cuda::multiply_halves<Half>(operands...); });
}

void multiplies_bits() {
  std::vector<uint32_t> a(16 * 8), b(8 * 8);
  for (auto* words : {&a, &b}) {
    for (uint32_t& word : *words) word = random_bits();
  }
  std::vector<int32_t> sum(16 * 8);
  const uint32_t *left = a.data(), *right = b.data();
  CHECK(cuda::launch(nullptr, bits_kernel, 1, 32, 0, left, right, sum.data()) == Status::ok);
  for (int i = 0; i < 16 * 8; ++i) {
    int32_t want = 0;
    for (int w = 0; w < 8; ++w) want += std::popcount(a[i / 8 * 8 + w] & b[i % 8 * 8 + w]);
    CHECK(sum[i] == want);
  }
}

void multiplies_int8() {
  std::vector<int8_t> a(16 * 32), b(8 * 32);
  for (auto* values : {&a, &b}) {
    for (int8_t& value : *values) value = static_cast<int8_t>(random_bits());
  }
  std::vector<int32_t> sum(16 * 8);
  const auto *left = reinterpret_cast<const uint32_t*>(a.data()), *right = reinterpret_cast<const uint32_t*>(b.data());
  CHECK(cuda::launch(nullptr, int8_kernel, 1, 32, 0, left, right, sum.data()) == Status::ok);
  for (int i = 0; i < 16 * 8; ++i) {
    int32_t want = 0;
    for (int k = 0; k < 32; ++k) want += a[i / 8 * 32 + k] * b[i % 8 * 32 + k];
    CHECK(sum[i] == want);
  }
}

template <class Half>
void multiplies_halves() {
  std::vector<Half> a(16 * 16), b(8 * 16);
  for (auto* values : {&a, &b}) {
    for (Half& value : *values) store(static_cast<float>(static_cast<int>(random_bits() % 17)) - 8.0f, &value);
  }
  std::vector<float> sum(16 * 8);
  const auto *left = reinterpret_cast<const uint32_t*>(a.data()), *right = reinterpret_cast<const uint32_t*>(b.data());
  CHECK(cuda::launch(nullptr, halves_kernel<Half>, 1, 32, 0, left, right, sum.data()) == Status::ok);
  for (int i = 0; i < 16 * 8; ++i) {
    float want = 0;
    for (int k = 0; k < 16; ++k) want += to_float(a[i / 8 * 16 + k]) * to_float(b[i % 8 * 16 + k]);
    CHECK(sum[i] == want);
  }
}

}  // namespace

int main() {
  for (const bool backwards : {false, true}) {
    emulation::last_to_first = backwards;
    CHECK(mirrors(true, true));
    CHECK(!mirrors(false, true));
    CHECK(!mirrors(true, false));
    std::vector<int> right(64);
    CHECK(cuda::launch(nullptr, lanes_kernel, 1, 64, 0, right.data()) == Status::ok);
    CHECK(std::accumulate(right.begin(), right.end(), 0) == 64);
  }
  multiplies_bits();
  multiplies_int8();
  multiplies_halves<BFloat16>();
  multiplies_halves<Float16>();
  CHECK(cuda::launch(nullptr, lanes_kernel, 1, 2048, 0, static_cast<int*>(nullptr)) == Status::device_error);
  CHECK(cuda::launch(nullptr, lanes_kernel, int64_t{1} << 31, 32, 0, static_cast<int*>(nullptr)) == Status::bad_size);
  return failures() != 0;
}

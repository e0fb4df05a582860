// SPDX-License-Identifier: Apache-2.0
// Every float32 there is through every format and rounding of fp4_cast and through e8m0_cast, on every instruction set
// of this machine, against their definitions in double and, where the compiler finds it, against cuda_fp4.h.
//   sweep_fp4 [FIRST LAST]   parts FIRST ... LAST - 1 of 256; a part is all floats whose upper byte it is
//   sweep_fp4 draws          stochastic rounding is unbiased: 10^7 draws in every binade
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if __has_include(<cuda_fp4.h>)
#include <cuda_fp4.h>
#define BITMILL_CUDA_FP4 1
#endif

#include "cpu.h"
#include "fp4_definition.h"

namespace {

using namespace bitmill;
using bitmill_test::defined_codes;
using bitmill_test::DefinedCodes;
using bitmill_test::kFormats;
using bitmill_test::kRoundings;
using bitmill_test::NamedFormat;

constexpr RandomStream kStream{2026, 11};
constexpr int64_t kPiece = int64_t{1} << 16;

int64_t codes_compared = 0, wrong = 0;

void report(const char* what, const char* name, Rounding rounding, float x, int got, int want) {
  if (++wrong <= 20) {
    std::printf("%s %s rounding %d: %a has %d, expected %d\n", what, name, static_cast<int>(rounding), x, got, want);
  }
}

int nibble(const std::vector<uint8_t>& packed, size_t i) { return (packed[i / 2] >> (4 * (i % 2))) & 15; }

// The codes of each rounding, two a byte.
std::vector<std::vector<uint8_t>> defined(const NamedFormat& named, const std::vector<float>& x) {
  std::vector<std::vector<uint8_t>> packed(std::size(kRoundings), std::vector<uint8_t>(x.size() / 2));
  RandomWords random(kStream);
  for (size_t i = 0; i < x.size(); ++i) {
    const DefinedCodes codes = defined_codes(named, x[i], random(i));
    for (const Rounding rounding : kRoundings) {
      packed[static_cast<size_t>(rounding)][i / 2] |= static_cast<uint8_t>(codes[rounding] << (4 * (i % 2)));
    }
  }
  return packed;
}

void sweep_casts(const std::vector<float>& x) {
  std::vector<uint8_t> packed(x.size() / 2);
  for (const NamedFormat& named : kFormats) {
    const auto all = defined(named, x);
    for (const Rounding rounding : kRoundings) {
      const std::vector<uint8_t>& want = all[static_cast<size_t>(rounding)];
      for (const InstructionSet set : kInstructionSets) {
        if (!select(set)) continue;
        Fp4CastParams p{.x = x.data(), .m = 1, .k = std::ssize(x), .row_stride = std::ssize(x)};
        p.format = named.format;
        p.rounding = rounding;
        p.random = kStream;
        p.packed = packed.data();
        if (fp4_cast(p) != Status::ok) std::abort();
        codes_compared += std::ssize(x);
        if (packed == want) continue;
        for (size_t i = 0; i < x.size(); ++i) {
          if (nibble(packed, i) == nibble(want, i)) continue;
          report(name(set), named.name, rounding, x[i], nibble(packed, i), nibble(want, i));
        }
      }
    }
  }
}

// log2 |x| rounded down or up, plus 127, in 0 ... 254.
int defined_e8m0(float x, bool up) {
  if (std::isnan(x)) return 255;
  if (std::isinf(x)) return 254;
  if (x == 0) return 0;
  int exponent;
  const double mantissa = std::frexp(std::fabs(static_cast<double>(x)), &exponent);
  const int byte = exponent - 1 + (up && mantissa != 0.5) + 127;
  return byte < 0 ? 0 : byte > 254 ? 254 : byte;
}

void sweep_scales(const std::vector<float>& x) {
  std::vector<uint8_t> bytes(x.size());
  for (const bool up : {false, true}) {
    for (const InstructionSet set : kInstructionSets) {
      if (!select(set)) continue;
      if (e8m0_cast(x.data(), Dtype::f32, std::ssize(x), up, bytes.data()) != Status::ok) std::abort();
      for (size_t i = 0; i < x.size(); ++i) {
        const int want = defined_e8m0(x[i], up);
        if (bytes[i] != want) report(name(set), up ? "e8m0 up" : "e8m0 down", Rounding{}, x[i], bytes[i], want);
      }
      codes_compared += std::ssize(x);
    }
  }
}

#ifdef BITMILL_CUDA_FP4
void sweep_cuda(const std::vector<float>& x) {
  for (const float value : x) {
    const DefinedCodes codes = defined_codes(kFormats[0], value, 0);
    for (const auto& [rounding, mode] :
         {std::pair{Rounding::nearest_even, cudaRoundNearest}, {Rounding::toward_zero, cudaRoundZero}}) {
      const int want = __nv_cvt_float_to_fp4(value, __NV_E2M1, mode);
      if (codes[rounding] != want) report("definition and cuda_fp4.h", "e2m1", rounding, value, codes[rounding], want);
    }
    for (const bool up : {false, true}) {
      const int got = defined_e8m0(value, up);
      const int want = __nv_cvt_float_to_e8m0(value, __NV_SATFINITE, up ? cudaRoundPosInf : cudaRoundZero);
      if (got != want) report("definition and cuda_fp8.h", "e8m0", Rounding{}, value, got, want);
    }
  }
  codes_compared += 4 * std::ssize(x);
}
#endif

int sweep(int first, int last) {
  std::vector<float> x(kPiece);
  for (int part = first; part < last; ++part) {
    for (int64_t piece = 0; piece < (int64_t{1} << 24) / kPiece; ++piece) {
      const uint32_t start = (static_cast<uint32_t>(part) << 24) + static_cast<uint32_t>(piece * kPiece);
      for (uint32_t i = 0; i < kPiece; ++i) x[i] = std::bit_cast<float>(start + i);
      sweep_casts(x);
      sweep_scales(x);
#ifdef BITMILL_CUDA_FP4
      sweep_cuda(x);
#endif
    }
  }
  std::printf("parts %d ... %d of 256: %lld codes compared, %lld wrong\n", first, last - 1,
              static_cast<long long>(codes_compared), static_cast<long long>(wrong));
  return wrong != 0;
}

// Floats all over a binade, each rounded once; the sum of errors in units of its own standard deviation.
double deviation(const NamedFormat& named, int exponent, int64_t draws) {
  std::vector<float> x(kPiece);
  std::vector<uint8_t> packed(kPiece / 2);
  double error = 0, variance = 0;
  for (int64_t done = 0, round = 0; done < draws; done += kPiece, ++round) {
    const uint64_t stream = static_cast<uint64_t>(round) << 8 | static_cast<uint64_t>(named.format.exponent_bits);
    RandomWords mantissa({99, stream});
    for (int64_t i = 0; i < kPiece; ++i) {
      const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23 | mantissa(static_cast<uint64_t>(i)) >> 9;
      x[static_cast<size_t>(i)] = std::bit_cast<float>(bits);
    }
    Fp4CastParams p{.x = x.data(), .m = 1, .k = kPiece, .row_stride = kPiece, .format = named.format};
    p.rounding = Rounding::stochastic;
    p.random = {static_cast<uint64_t>(exponent), stream};
    p.packed = packed.data();
    if (fp4_cast(p) != Status::ok) std::abort();
    for (size_t i = 0; i < x.size(); ++i) {
      int below = 7;
      while (x[i] < named.values[below]) --below;
      if (below == 7) continue;
      const double lower = named.values[below], upper = named.values[below + 1];
      error += named.values[nibble(packed, i)] - x[i];
      variance += (x[i] - lower) * (upper - x[i]);
    }
  }
  return variance > 0 ? error / std::sqrt(variance) : 0;
}

int sweep_draws() {
  double largest = 0;
  for (const NamedFormat& named : kFormats) {
    for (int exponent = -16; exponent < 4; ++exponent) {
      if (std::ldexp(1.0, exponent) >= named.values[7]) break;
      const double deviations = deviation(named, exponent, 10'000'000);
      std::printf("%s 2^%d: %.2f standard deviations\n", named.name, exponent, deviations);
      largest = std::fmax(largest, std::fabs(deviations));
    }
  }
  std::printf("at most %.2f standard deviations\n", largest);
  return largest > 4;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::strcmp(arguments[1], "draws") == 0) return sweep_draws();
  const int first = count == 3 ? std::atoi(arguments[1]) : 0, last = count == 3 ? std::atoi(arguments[2]) : 256;
  return sweep(first, last);
}

// SPDX-License-Identifier: Apache-2.0
// FP4 casts as their definition says, in double, where all that a float needs is exact.
#pragma once

#include <cmath>
#include <cstdint>

#include "fp4.h"

namespace bitmill_test {

using bitmill::Fp4Format;
using bitmill::Rounding;

inline constexpr Rounding kRoundings[] = {Rounding::nearest_even, Rounding::stochastic, Rounding::toward_zero,
                                          Rounding::half_away};

struct NamedFormat {
  const char* name;
  Fp4Format format;
  double values[8];
  int tie_codes[7];  // where the middle of value i and value i + 1 goes
};

inline constexpr NamedFormat kFormats[] = {
    {"e2m1", bitmill::kE2M1, {0, .5, 1, 1.5, 2, 3, 4, 6}, {0, 2, 2, 4, 4, 6, 6}},
    {"e1m2", bitmill::kE1M2, {0, .5, 1, 1.5, 2, 2.5, 3, 3.5}, {0, 2, 2, 4, 4, 6, 6}},
    {"e3m0", bitmill::kE3M0, {0, .25, .5, 1, 2, 4, 8, 16}, {0, 2, 3, 4, 5, 6, 7}},
};

// The codes of x by Rounding; NaN is 7. `random` counts for stochastic rounding only.
struct DefinedCodes {
  int of[4];
  int operator[](Rounding rounding) const { return of[static_cast<int>(rounding)]; }
};
inline DefinedCodes defined_codes(const NamedFormat& named, float x, uint32_t random) {
  if (std::isnan(x)) return {{7, 7, 7, 7}};
  const double magnitude = std::fabs(static_cast<double>(x));
  int i = 7;
  while (magnitude < named.values[i]) --i;
  const int sign = std::signbit(x) ? 8 : 0, code = i + sign;
  if (i == 7) return {{code, code, code, code}};
  const double lower = named.values[i], upper = named.values[i + 1], middle = (lower + upper) / 2;
  const double chance = std::floor((magnitude - lower) / (upper - lower) * 0x1p32);
  DefinedCodes codes{};
  const auto set = [&](Rounding rounding, int value) { codes.of[static_cast<int>(rounding)] = value; };
  set(Rounding::nearest_even, magnitude == middle ? named.tie_codes[i] + sign : code + (magnitude > middle));
  set(Rounding::stochastic, code + (chance + random >= 0x1p32));
  set(Rounding::toward_zero, code);
  set(Rounding::half_away, code + (magnitude >= middle));
  return codes;
}

}  // namespace bitmill_test

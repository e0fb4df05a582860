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

// The code of x; NaN is 7. `random` counts for stochastic rounding only.
inline int defined_code(const NamedFormat& named, Rounding rounding, float x, uint32_t random) {
  if (std::isnan(x)) return 7;
  const double magnitude = std::fabs(static_cast<double>(x));
  int i = 7;
  while (magnitude < named.values[i]) --i;
  const int sign = std::signbit(x) ? 8 : 0;
  if (i == 7) return 7 + sign;
  const double lower = named.values[i], upper = named.values[i + 1], middle = (lower + upper) / 2;
  switch (rounding) {
    case Rounding::nearest_even:
      return (magnitude == middle ? named.tie_codes[i] : magnitude > middle ? i + 1 : i) + sign;
    case Rounding::stochastic:
      return i + (std::floor((magnitude - lower) / (upper - lower) * 0x1p32) + random >= 0x1p32) + sign;
    case Rounding::toward_zero:
      return i + sign;
    case Rounding::half_away:
      return i + (magnitude >= middle) + sign;
  }
  return -1;
}

}  // namespace bitmill_test

// SPDX-License-Identifier: Apache-2.0
// The names in the arguments of the fp4 family, for every device.
#pragma once

#include <string>

#include "checks.h"
#include "fp4.h"

namespace bitmill {

inline constexpr int64_t kFp4GroupMultiple = 8;  // the codes of a word

inline Fp4Format format_of(const char* op, const std::string& format) {
  if (format == "e2m1") return kE2M1;
  if (format == "e1m2") return kE1M2;
  if (format == "e3m0") return kE3M0;
  fail(op, ": format must be \"e2m1\", \"e1m2\" or \"e3m0\", got \"", format, "\"");
}

inline Fp4Table table_of(const char* op, const std::string& format) {
  if (format == "nf4") return kNf4;
  if (format == "bnb-fp4") return kBnbFp4;
  if (format == "e2m1" || format == "e1m2" || format == "e3m0") return fp4_table(format_of(op, format));
  fail(op, ": format must be \"e2m1\", \"e1m2\", \"e3m0\", \"nf4\" or \"bnb-fp4\", got \"", format, "\"");
}

inline NanPolicy nan_policy_of(const char* op, const std::string& nan) {
  if (nan == "max") return NanPolicy::max;
  if (nan == "zero") return NanPolicy::zero;
  if (nan == "error") return NanPolicy::error;
  fail(op, ": nan must be \"max\", \"zero\" or \"error\", got \"", nan, "\"");
}

inline ScaleRule scale_rule_of(const char* op, const std::string& rule) {
  if (rule == "floor") return ScaleRule::floor;
  if (rule == "rceil") return ScaleRule::rceil;
  if (rule == "ceil") return ScaleRule::ceil;
  if (rule == "even") return ScaleRule::even;
  fail(op, ": scale_rule must be \"floor\", \"rceil\", \"ceil\" or \"even\", got \"", rule, "\"");
}

inline Rounding rounding_of(const char* op, const std::string& rounding) {
  if (rounding == "nearest_even") return Rounding::nearest_even;
  if (rounding == "stochastic") return Rounding::stochastic;
  if (rounding == "toward_zero") return Rounding::toward_zero;
  if (rounding == "half_away") return Rounding::half_away;
  fail(op, ": rounding must be \"nearest_even\", \"stochastic\", \"toward_zero\" or \"half_away\", got \"", rounding,
       "\"");
}

inline RandomStream stream_of(int64_t seed, int64_t offset) {
  return {static_cast<uint64_t>(seed), static_cast<uint64_t>(offset)};
}

}  // namespace bitmill

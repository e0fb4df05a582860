// SPDX-License-Identifier: Apache-2.0
// All that a core test needs: CHECK counts failures and prints the places of the first, so one run shows more than one.
#pragma once

#include <cstdio>

namespace bitmill_test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool condition, const char* text, const char* file, int line) {
  if (condition) return;
  if (++failures() > 20) return;  // what fits on a screen
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

}  // namespace bitmill_test

#define CHECK(condition) bitmill_test::check((condition), #condition, __FILE__, __LINE__)

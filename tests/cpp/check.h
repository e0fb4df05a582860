// SPDX-License-Identifier: Apache-2.0
// All that a core test needs: CHECK prints the place of a failure and counts it, so one run shows every failure.
#pragma once

#include <cstdio>

namespace bitmill_test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool condition, const char* text, const char* file, int line) {
  if (condition) return;
  ++failures();
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

}  // namespace bitmill_test

#define CHECK(condition) bitmill_test::check((condition), #condition, __FILE__, __LINE__)

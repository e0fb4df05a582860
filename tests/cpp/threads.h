// SPDX-License-Identifier: Apache-2.0
// What stands for a pool of threads in a test: the parts come one after the other, in an order that no pool promises.
#pragma once

#include "parallel.h"

namespace bitmill_test {

// Single items, the last one first.
inline void scattered_for(int64_t begin, int64_t end, int64_t, bitmill::ParallelBody body, void* context) {
  for (int64_t i = end; i > begin; --i) body(context, i - 1, i);
}

// Two halves, the second one first.
inline void reversed_for(int64_t begin, int64_t end, int64_t, bitmill::ParallelBody body, void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  if (middle < end) body(context, middle, end);
  if (begin < middle) body(context, begin, middle);
}

}  // namespace bitmill_test

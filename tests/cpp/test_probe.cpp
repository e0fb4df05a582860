// SPDX-License-Identifier: Apache-2.0
// The probes: a peak where the instructions exist and 0 where not, in plausible proportion; bandwidths of any size.
#include <vector>

#include "check.h"
#include "cpu.h"
#include "probe.h"

using namespace bitmill;

int main() {
  const bool wide = available(InstructionSet::avx512), any = wide || available(InstructionSet::avx2);
  CHECK((popcount_peak() > 0) == any);
  CHECK((float32_peak() > 0) == any);
  CHECK((bfloat16_peak() > 0) == (wide && has_bf16_dot()));
  CHECK((int8_peak() > 0) == any);
  if (any) CHECK(popcount_peak() > 4 * float32_peak());

  std::vector<char> from(1 << 20, 'x'), to(1 << 20);
  CHECK(read_bandwidth(from.data(), 1 << 20) > 0);
  CHECK(read_bandwidth(from.data(), 0) == 0);
  CHECK(copy_bandwidth(to.data(), from.data(), 1 << 20) > 0);
  CHECK(to == from);
  CHECK(binary_matmul_seconds(3, 17, 33, 3) > 0);
  return bitmill_test::failures() != 0;
}

// SPDX-License-Identifier: Apache-2.0
// The choice of the probe for this machine.
#include "probe.h"

#include "cpu.h"

namespace bitmill {

double popcount_peak() {
#ifdef BITMILL_AVX512
  if (available(InstructionSet::avx512)) return detail::popcount_peak_avx512();
#endif
  return 0.0;
}

}  // namespace bitmill

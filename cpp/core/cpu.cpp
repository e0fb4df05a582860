// SPDX-License-Identifier: Apache-2.0
// CPUID, asked once. A set counts only if this library was built with its kernels and the operating system
// keeps the registers (which the compiler's builtin checks).
#include "cpu.h"

#include <atomic>

namespace bitmill {
namespace {

InstructionSet detect() { return available(InstructionSet::avx512) ? InstructionSet::avx512 : InstructionSet::generic; }

std::atomic<InstructionSet>& choice() {
  static std::atomic<InstructionSet> value{detect()};
  return value;
}

}  // namespace

const char* name(InstructionSet set) { return set == InstructionSet::avx512 ? "avx512" : "generic"; }

bool available(InstructionSet set) {
  if (set == InstructionSet::generic) return true;
#ifdef BITMILL_AVX512
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

InstructionSet best() { return detect(); }

InstructionSet selected() { return choice().load(std::memory_order_relaxed); }

bool select(InstructionSet set) {
  if (!available(set)) return false;
  choice().store(set, std::memory_order_relaxed);
  return true;
}

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// CPUID, asked once. A set counts only if this library was built with its kernels and the operating system
// keeps the registers (which the compiler's builtin checks).
#include "cpu.h"

#include <atomic>
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace bitmill {
namespace {

InstructionSet detect() {
  InstructionSet widest = InstructionSet::generic;
  for (const InstructionSet set : kInstructionSets) {
    if (available(set)) widest = set;
  }
  return widest;
}

std::atomic<InstructionSet>& choice() {
  static std::atomic<InstructionSet> value{detect()};
  return value;
}

}  // namespace

const char* name(InstructionSet set) {
  switch (set) {
    case InstructionSet::generic:
      return "generic";
    case InstructionSet::neon:
      return "neon";
    case InstructionSet::avx2:
      return "avx2";
    case InstructionSet::avx512:
      return "avx512";
  }
  return "unknown";
}

bool available(InstructionSet set) {
  switch (set) {
    case InstructionSet::generic:
      return true;
    case InstructionSet::neon:
#ifdef BITMILL_NEON
      return true;
#else
      return false;
#endif
    case InstructionSet::avx2:
#ifdef BITMILL_AVX2
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("popcnt");
#else
      return false;
#endif
    case InstructionSet::avx512:
#if defined(BITMILL_EMULATED_AVX512)  // by tests/cpp/emulation/avx512
      return available(InstructionSet::avx2);
#elif defined(BITMILL_AVX512)
      __builtin_cpu_init();
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vpopcntdq");
#else
      return false;
#endif
  }
  return false;
}

InstructionSet best() { return detect(); }

InstructionSet selected() { return choice().load(std::memory_order_relaxed); }

bool select(InstructionSet set) {
  if (!available(set)) return false;
  choice().store(set, std::memory_order_relaxed);
  return true;
}

bool eight_lanes() { return selected() == InstructionSet::neon || selected() == InstructionSet::avx2; }

bool has_int8_dot() {
#if defined(BITMILL_EMULATED_AVX512)
  return true;
#elif defined(BITMILL_AVX512)
  static const bool has = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                          __builtin_cpu_supports("avx512vbmi2");
  return has;
#else
  return false;
#endif
}

bool asks_for_writes() {
#ifdef __x86_64__
  static const bool asks = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return true;
    const bool amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
    if (!amd || !__get_cpuid(1, &a, &b, &c, &d)) return true;
    const unsigned family = (a >> 8 & 0xF) + (a >> 20 & 0xFF);
    return family < 0x1A;
  }();
  return asks;
#else
  return true;
#endif
}

bool has_bf16_dot() {
#if defined(BITMILL_EMULATED_AVX512)
  return true;
#elif defined(BITMILL_AVX512)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

}  // namespace bitmill

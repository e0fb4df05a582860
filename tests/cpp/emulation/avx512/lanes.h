// SPDX-License-Identifier: Apache-2.0
// What the emulated instructions of immintrin.h are made of: vectors as arrays of lanes.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef BITMILL_CHECKED_MEMORY
#include <sanitizer/asan_interface.h>
#endif

namespace emulated {

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "AVX-512 emulation: %s\n", what);
  std::abort();
}

template <class T, class V>
using Lanes = std::array<T, sizeof(V) / sizeof(T)>;

template <class T, class V>
inline Lanes<T, V> lanes(V v) {
  return std::bit_cast<Lanes<T, V>>(v);
}

// f of the lanes of type T of every operand, which have the same length.
template <class T, class F, class V, class... Vs>
inline V each(F f, V a, Vs... more) {
  Lanes<T, V> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<T>(f(lanes<T>(a)[i], lanes<T>(more)[i]...));
  return std::bit_cast<V>(out);
}

// The bits i for which f holds of lane i of every operand.
template <class T, class Mask, class F, class V, class... Vs>
inline Mask where(F f, V a, Vs... more) {
  Mask mask = 0;
  for (size_t i = 0; i < Lanes<T, V>{}.size(); ++i) {
    mask = static_cast<Mask>(mask | static_cast<Mask>(Mask{f(lanes<T>(a)[i], lanes<T>(more)[i]...)} << i));
  }
  return mask;
}

// Lanes of `a` where the mask is set, of `b` elsewhere.
template <class T, class V>
inline V select(uint64_t mask, V a, V b) {
  Lanes<T, V> out = lanes<T>(b);
  for (size_t i = 0; i < out.size(); ++i) out[i] = mask >> i & 1 ? lanes<T>(a)[i] : out[i];
  return std::bit_cast<V>(out);
}

// From is a type of lanes in `v`, To the type that they become.
template <class Out, class To, class From, class V>
inline Out convert(V v) {
  Lanes<To, Out> out{};
  const Lanes<From, V> in = lanes<From>(v);
  for (size_t i = 0; i < out.size() && i < in.size(); ++i) out[i] = static_cast<To>(in[i]);
  return std::bit_cast<Out>(out);
}

// Lanes of `v` by number, which counts on into `w` where there is one.
template <class T>
using Number = std::conditional_t<sizeof(T) == 1, uint8_t, std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>>;
template <class T, class I, class V>
inline V permute(I index, V v) {
  Lanes<T, V> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = lanes<T>(v)[lanes<Number<T>>(index)[i] % out.size()];
  return std::bit_cast<V>(out);
}
template <class T, class I, class V>
inline V permute2(V v, I index, V w) {
  Lanes<T, V> out;
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t from = lanes<Number<T>>(index)[i] % (2 * out.size());
    out[i] = lanes<T>(from < out.size() ? v : w)[from % out.size()];
  }
  return std::bit_cast<V>(out);
}

// In every 128 bits: lanes of the lower (or upper) 64 of the two operands in turn.
template <class T, class V>
inline V unpack(V a, V b, bool high) {
  constexpr size_t part = 16 / sizeof(T);
  Lanes<T, V> out;
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t from = i / part * part + (high ? part / 2 : 0) + i % part / 2;
    out[i] = i % 2 == 0 ? lanes<T>(a)[from] : lanes<T>(b)[from];
  }
  return std::bit_cast<V>(out);
}

// The two halves through an instruction of 256 bits.
template <class Half, class F, class V, class... Vs>
inline V halves(F f, V a, Vs... more) {
  const std::array<Half, 2> out = {f(lanes<Half>(a)[0], lanes<Half>(more)[0]...),
                                   f(lanes<Half>(a)[1], lanes<Half>(more)[1]...)};
  return std::bit_cast<V>(out);
}

// The files with kernels are not instrumented, which would take g++ minutes; memory is checked here instead.
inline void touch(const void* p, size_t bytes) {
#ifdef BITMILL_CHECKED_MEMORY
  if (__asan_region_is_poisoned(const_cast<void*>(p), bytes)) stop("memory that nobody owns is read or written");
#else
  (void)p, (void)bytes;
#endif
}
template <class V>
inline V load(const void* p) {
  touch(p, sizeof(V));
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store(void* p, V v) {
  touch(p, sizeof(V));
  std::memcpy(p, &v, sizeof(V));
}
// Faults where the instruction would.
inline void aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) stop("an aligned load or store of an address that is not");
}
template <class T, class V>
inline V load_lanes(uint64_t mask, const void* p) {
  Lanes<T, V> out{};
  for (size_t i = 0; i < out.size(); ++i) {
    if (mask >> i & 1) out[i] = load<T>(static_cast<const T*>(p) + i);
  }
  return std::bit_cast<V>(out);
}
template <class T, class V>
inline void store_lanes(void* p, uint64_t mask, V v) {
  for (size_t i = 0; i < Lanes<T, V>{}.size(); ++i) {
    if (mask >> i & 1) store(static_cast<T*>(p) + i, lanes<T>(v)[i]);
  }
}

template <class T, class V>
inline V expand(V other, uint64_t mask, V v) {
  Lanes<T, V> out = lanes<T>(other);
  for (size_t i = 0, next = 0; i < out.size(); ++i) {
    if (mask >> i & 1) out[i] = lanes<T>(v)[next++];
  }
  return std::bit_cast<V>(out);
}
template <class T, class V>
inline V compress(V other, uint64_t mask, V v) {
  Lanes<T, V> out = lanes<T>(other);
  for (size_t i = 0, next = 0; i < out.size(); ++i) {
    if (mask >> i & 1) out[next++] = lanes<T>(v)[i];
  }
  return std::bit_cast<V>(out);
}

// Halves onto each other until one lane is left, as the compilers write it.
template <class T, class F, class V>
inline T reduce(F f, V v) {
  Lanes<T, V> x = lanes<T>(v);
  for (size_t half = x.size() / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) x[i] = f(x[i], x[i + half]);
  }
  return x[0];
}

// 4-byte groups of a (unsigned bytes) times those of b (signed), added to the sum without saturation.
template <class V>
inline V dot_bytes(V sum, V a, V b) {
  Lanes<uint32_t, V> out = lanes<uint32_t>(sum);
  for (size_t i = 0; i < out.size(); ++i) {
    for (size_t j = 4 * i; j < 4 * i + 4; ++j) {
      out[i] += static_cast<uint32_t>(int{lanes<uint8_t>(a)[j]} * int{lanes<int8_t>(b)[j]});
    }
  }
  return std::bit_cast<V>(out);
}

inline int32_t rounded(float x) {  // vcvtps2dq, to nearest even
  const float r = std::nearbyint(x);
  return r >= -0x1p31f && r < 0x1p31f ? static_cast<int32_t>(r) : std::numeric_limits<int32_t>::min();
}
inline int32_t truncated(float x) {
  return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(x) : std::numeric_limits<int32_t>::min();
}
inline uint32_t truncated_unsigned(float x) {
  return x > -1.0f && x < 0x1p32f ? static_cast<uint32_t>(std::fmax(x, 0.0f)) : 0xFFFFFFFFu;
}

template <class T>
inline T scaled(T x, T exponent) {  // x 2^floor(exponent)
  const T floor = std::floor(exponent);
  if (!(std::fabs(floor) < 10000)) {  // infinite, or not a number
    if (std::isnan(floor) || std::isnan(x)) return x + exponent;
    return floor > 0 ? x * std::numeric_limits<T>::infinity() : x * T{0};
  }
  return std::scalbn(x, static_cast<int>(floor));
}

template <class T>
inline bool compared(T a, T b, int predicate) {
  switch (predicate) {
    case _CMP_EQ_OQ:
      return a == b;
    case _CMP_NEQ_OQ:
      return a < b || a > b;
    case _CMP_NEQ_UQ:
      return !(a == b);
    case _CMP_LT_OQ:
      return a < b;
    case _CMP_NLT_UQ:
      return !(a < b);
    case _CMP_LE_OQ:
      return a <= b;
    case _CMP_GT_OQ:
      return a > b;
    case _CMP_GE_OQ:
      return a >= b;
    case _CMP_UNORD_Q:
      return std::isunordered(a, b);
    case _CMP_ORD_Q:
      return !std::isunordered(a, b);
    default:
      stop("a comparison that it does not know");
  }
}

}  // namespace emulated

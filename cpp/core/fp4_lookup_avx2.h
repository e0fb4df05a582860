// SPDX-License-Identifier: Apache-2.0
// Codes of 4 bits to the 16 floats of a table with AVX2, whose only lookup of 16 entries is of bytes: vpshufb looks up
// every byte of the floats that is not 0 in the whole table, for 32 codes at once, and interleaving makes floats of
// them. That is 3 shuffles for 8 floats, or 1 for a table of bfloat16s; vpermps would take two lookups of 8 entries, of
// two operations each, and a blend.
#pragma once

#include <algorithm>
#include <bit>

#include "avx2.h"
#include "fp4.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

// 16 bytes, the same in both lanes of a vector.
struct LaneBytes {
  alignas(16) uint8_t byte[16];
};
static inline __m256i both_lanes(const LaneBytes& bytes) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes.byte)));
}

static inline bool are_bfloat16(const float* table) {
  return std::all_of(table, table + 16, [](float value) { return (std::bit_cast<uint32_t>(value) & 0xFFFFu) == 0; });
}

// `planes` upper bytes of a float: 4, or 2 if are_bfloat16(table).
template <int planes>
struct Fp4Lookup {
  __m256i byte[planes];  // of the 16 values; the lowest first

  explicit Fp4Lookup(const float* table) {
    for (int plane = 0; plane < planes; ++plane) {
      LaneBytes bytes;
      for (int i = 0; i < 16; ++i) {
        bytes.byte[i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(table[i]) >> 8 * (plane + 4 - planes));
      }
      byte[plane] = both_lanes(bytes);
    }
  }

  // Of a lane of 16 codes, the place of the one that becomes element i, 0 ... 3, of that lane of vector v, 0 ... 3.
  static constexpr int place(int v, int i) { return planes == 4 ? 4 * v + i : 8 * (v / 2) + 2 * i + v % 2; }

  // 32 codes, a byte each, to 4 vectors.
  [[gnu::always_inline]] void operator()(__m256i codes, __m256 (&values)[4]) const {
    const auto floats = [](__m256i v) { return _mm256_castsi256_ps(v); };
    const __m256i b2 = _mm256_shuffle_epi8(byte[planes - 2], codes);
    const __m256i b3 = _mm256_shuffle_epi8(byte[planes - 1], codes);
    const __m256i upper_low = _mm256_unpacklo_epi8(b2, b3), upper_high = _mm256_unpackhi_epi8(b2, b3);
    if constexpr (planes == 4) {
      const __m256i b0 = _mm256_shuffle_epi8(byte[0], codes), b1 = _mm256_shuffle_epi8(byte[1], codes);
      const __m256i lower_low = _mm256_unpacklo_epi8(b0, b1), lower_high = _mm256_unpackhi_epi8(b0, b1);
      values[0] = floats(_mm256_unpacklo_epi16(lower_low, upper_low));
      values[1] = floats(_mm256_unpackhi_epi16(lower_low, upper_low));
      values[2] = floats(_mm256_unpacklo_epi16(lower_high, upper_high));
      values[3] = floats(_mm256_unpackhi_epi16(lower_high, upper_high));
    } else {  // pairs of bfloat16s
      const __m256i second = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
      values[0] = floats(_mm256_slli_epi32(upper_low, 16));
      values[1] = floats(_mm256_and_si256(upper_low, second));
      values[2] = floats(_mm256_slli_epi32(upper_high, 16));
      values[3] = floats(_mm256_and_si256(upper_high, second));
    }
  }
};

// One word of 8 outputs, 8 columns of each, to vectors of 8 outputs: columns 0 2 4 6 (half 0) or 1 3 5 7 (half 1).
template <int planes>
struct Fp4TileLookup : Fp4Lookup<planes> {
  using Fp4Lookup<planes>::Fp4Lookup;

  static constexpr LaneBytes kOrder = [] {
    LaneBytes order{};
    for (int v = 0; v < 4; ++v) {
      for (int i = 0; i < 4; ++i) order.byte[Fp4Lookup<planes>::place(v, i)] = static_cast<uint8_t>(4 * i + v);
    }
    return order;
  }();

  static __m256i load(const int32_t* words) { return _mm256_shuffle_epi8(load_bits(words), both_lanes(kOrder)); }
  static __m256i half(__m256i pairs, int half) {
    return _mm256_and_si256(half ? _mm256_srli_epi16(pairs, 4) : pairs, _mm256_set1_epi8(15));
  }
};

// The column of a word that is decoded as number i.
static constexpr int decoded_column(int i) { return i < 4 ? 2 * i : 2 * i - 7; }

// 16 bytes of codes of 32 columns of a row to vectors of 8 columns.
template <int planes>
struct Fp4RowLookup : Fp4Lookup<planes> {
  using Fp4Lookup<planes>::Fp4Lookup;

  struct Order {
    alignas(32) uint8_t byte[32];
  };
  static constexpr Order make(bool shifted) {
    Order order{};
    for (int lane = 0; lane < 2; ++lane) {
      for (int v = 0; v < 4; ++v) {
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * v + 4 * lane + i;
          const int place = 16 * lane + Fp4Lookup<planes>::place(v, i);
          order.byte[place] = static_cast<uint8_t>(column % 2 == (shifted ? 1 : 0) ? column / 2 : 0x80);
        }
      }
    }
    return order;
  }
  static constexpr Order kEven = make(false), kOdd = make(true);

  static __m256i codes(__m128i bytes) {
    const auto load = [](const Order& o) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(o.byte)); };
    const __m256i pairs = _mm256_broadcastsi128_si256(bytes), nibble = _mm256_set1_epi8(15);
    const __m256i even = _mm256_shuffle_epi8(_mm256_and_si256(pairs, nibble), load(kEven));
    const __m256i odd = _mm256_shuffle_epi8(_mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble), load(kOdd));
    return _mm256_or_si256(even, odd);
  }
  static __m256i load(const uint8_t* packed) {
    return codes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  }
};

}  // namespace
}  // namespace bitmill::detail

// SPDX-License-Identifier: Apache-2.0
// Dot products of signs of one or two words, such as an attention's scores. With so few words, writing is as much work
// as counting, and lines are written fastest from the first to the last: row after row, with the weights of a row's
// tiles in registers, since what reads the nearest cache waits for what is written. And k - 2 sum is one instruction.
#include <type_traits>

#include "avx512.h"
#include "binary_matmul.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

constexpr int kTiles = 13;  // side by side: two words of each take 26 registers

// `tiles` tiles from `tile` on, to integers or floats.
template <int words, int tiles, class T>
void short_rows(const BinaryMatmulParams& p, T* out, int64_t tile) {
  const __m512i columns = _mm512_set1_epi32(static_cast<int32_t>(p.k));
  const __m512i minus_two = _mm512_set1_epi32(0xFFFE);  // the lower half: a sum is at most 64
  const __mmask16 lanes = first_lanes(p.n - (tile + tiles - 1) * kTileRows);
  const int32_t* const weight = p.weight + tile * words * kTileRows;
  __m512i first[tiles], second[tiles];
  [[maybe_unused]] __m512 scale[tiles], bias[tiles];
#pragma GCC unroll 16
  for (int t = 0; t < tiles; ++t) {
    first[t] = _mm512_loadu_si512(weight + t * words * kTileRows);
    second[t] = _mm512_loadu_si512(weight + (t * words + words - 1) * kTileRows);
    if constexpr (std::is_same_v<T, float>) {
      const __mmask16 inside = t + 1 < tiles ? __mmask16{0xFFFF} : lanes;
      scale[t] = _mm512_maskz_loadu_ps(inside, p.scale + (tile + t) * kTileRows);
      bias[t] = p.bias ? _mm512_maskz_loadu_ps(inside, p.bias + (tile + t) * kTileRows) : _mm512_set1_ps(-0.0f);
    }
  }
  const auto put = [lanes](T* to, bool last, __m512i values) __attribute__((always_inline)) {
    if (last && lanes != 0xFFFF) return _mm512_mask_storeu_epi32(to, lanes, values);
    _mm512_storeu_si512(to, values);
  };
  const int32_t* a = p.a;
  out += tile * kTileRows;
  for (int64_t row = 0; row < p.m; ++row, a += words, out += p.n) {
    const __m512i a0 = _mm512_set1_epi32(a[0]), a1 = _mm512_set1_epi32(a[words - 1]);
#pragma GCC unroll 16
    for (int t = 0; t < tiles; ++t) {
      __m512i sum = _mm512_popcnt_epi32(_mm512_xor_si512(a0, first[t]));
      if constexpr (words == 2) sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a1, second[t])));
      __m512i result = _mm512_dpwssd_epi32(columns, sum, minus_two);
      if constexpr (std::is_same_v<T, float>) {
        const __m512 scaled = _mm512_mul_ps(scale[t], _mm512_cvtepi32_ps(result));
        result = _mm512_castps_si512(_mm512_add_ps(scaled, bias[t]));
      }
      put(out + t * kTileRows, t + 1 == tiles, result);
    }
  }
}

// The same for `count` <= `tiles` tiles.
template <int words, int tiles, class T>
void some_tiles(const BinaryMatmulParams& p, T* out, int64_t tile, int64_t count) {
  if (count == tiles) return short_rows<words, tiles>(p, out, tile);
  if constexpr (tiles > 1) some_tiles<words, tiles - 1>(p, out, tile, count);
}

template <class T>
void short_product(const BinaryMatmulParams& p, T* out) {
  const int64_t tiles = tile_count(p.n), panels = ceil_div(tiles, kTiles);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t tile = tiles * i / panels, count = tiles * (i + 1) / panels - tile;
    if (word_count(p.k) == 1) {
      some_tiles<1, kTiles>(p, out, tile, count);
    } else {
      some_tiles<2, kTiles>(p, out, tile, count);
    }
  }
}

}  // namespace

// Every tile, to integers or plain floats.
void binary_matmul_short_avx512vnni(const BinaryMatmulParams& p) {
  if (p.dot) return short_product(p, p.dot);
  short_product(p, static_cast<float*>(p.out));
}

}  // namespace bitmill::detail

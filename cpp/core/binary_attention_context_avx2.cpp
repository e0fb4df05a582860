// SPDX-License-Identifier: Apache-2.0
// The contexts of binary attention with AVX2: values of 32 channels are summed in bytes where a map is set, as long as
// bytes hold the sums.
#include <algorithm>

#include "binary_attention_avx2.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kMostSignedWords = 3;  // counts from -3 * 32 to 3 * 32 fit into bytes

template <bool zeros>
__m256i widen(const uint8_t* bytes) {
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  return zeros ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x);
}

// Adds what `words` words of the map, from `begin` on, have of 32 or 64 channels.
template <int vectors, bool zeros>
void meet_values(const Block& b, int64_t begin, int64_t words) {
  const auto put_row = [&](int64_t row, const Row& sums) {
    Line bytes;
    store_bits(bytes.bytes, sums.c0);
    if constexpr (vectors > 1) store_bits(bytes.bytes + 32, sums.c1);
    int32_t* whole = b.whole + row * kColumns;
    for (int i = 0; i < 32 * vectors; i += 8) {
      const __m256i x = widen<zeros>(bytes.bytes + i);
      store_bits(whole + i, begin == 0 ? x : _mm256_add_epi32(load_bits(whole + i), x));
    }
  };
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t row = 0; row < b.rows; row += kRows) {
    const uint16_t* offsets = b.offsets + row * b.next_offsets + 8 * begin;
    const auto sums = sum_up<vectors, zeros>(offsets, b.next_offsets, {b.plus, b.minus}, words, zero);
    put_row(row, sums.r0);
    put_row(row + 1, sums.r1);
    put_row(row + 2, sums.r2);
    put_row(row + 3, sums.r3);
  }
}

// The context of `channels` channels as bits of the next layer.
void put_levels(const Block& b, int64_t channel, int64_t channels) {
  const AttentionBits& bits = b.t.p.bits;
  const int64_t n = bits.heads * b.t.p.e, column = b.batch % bits.heads * b.t.p.e + channel;
  const int64_t top = bits.q_first[b.t.sequence(b.batch)] + b.first;
  for (int64_t i = 0; i < channels; i += 32) {
    const auto inside = [&](const int32_t* ranges, const int32_t* whole) {
      uint32_t found = 0;
      for (int lane = 0; lane < 32; lane += 8) {  // at most `length` past the first, as unsigned numbers
        const __m256i first = load_bits(ranges + column + i + lane);
        const __m256i length = _mm256_sub_epi32(load_bits(ranges + n + column + i + lane), first);
        const __m256i past = _mm256_sub_epi32(load_bits(whole + lane), first);
        const __m256i is_inside = _mm256_cmpeq_epi32(_mm256_min_epu32(past, length), past);
        found |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_inside))) << lane;
      }
      return found;
    };
    for (int64_t row = 0; row < b.rows; ++row) {
      const int32_t* whole = b.whole + row * kColumns + i;
      const int64_t at = (top + row) * (n / 32) + (column + i) / 32;
      const uint32_t positive = inside(bits.out.positive, whole);
      bits.out.sign[at] = static_cast<int32_t>(positive);
      if (bits.out.nonzero) bits.out.nonzero[at] = static_cast<int32_t>(positive | inside(bits.out.negative, whole));
    }
  }
}

void put_floats(const Block& b, int64_t channel, int64_t channels) {
  const BinaryAttentionParams& p = b.t.p;
  const __m256 step = _mm256_set1_ps(p.step);
  with_dtype(p.dtype, p.out, [&]<class T>(T* out) {
    for (int64_t row = 0; row < b.rows; ++row) {
      T* to = out + p.out_offset[b.batch] + (b.first + row) * p.out_row_stride + channel;
      const int32_t* whole = b.whole + row * kColumns;
      const auto value = [&](int64_t i) {
        const __m256 x = _mm256_mul_ps(step, _mm256_cvtepi32_ps(load_bits(whole + i)));
        return _mm256_add_ps(x, _mm256_set1_ps(b.addend[row]));
      };
      int64_t i = 0;
      for (; i + 8 <= channels; i += 8) store8(to + i, value(i));
      if (i == channels) continue;
      T last[8];
      store8(last, value(i));
      for (int64_t j = i; j < channels; ++j) to[j] = last[j - i];
    }
  });
}

template <int vectors, bool zeros>
void make_context(const Block& b, const int32_t* sign, const int32_t* nonzero, int64_t tile, int64_t channels) {
  const AttentionTask& t = b.t;
  const int64_t size = t.map_words * kTileRows, last = tile_count(t.p.e) - 1;
  const int64_t most = zeros ? kMostSignedWords : kMostWords;
  for (int64_t begin = 0; begin < t.map_words; begin += most) {
    const int64_t words = std::min(most, t.map_words - begin);
    for (int half = 0; half < vectors; ++half) {
      const int64_t first = tile + 2 * half, at = first * size + begin * kTileRows;
      Signs values{sign + at, zeros ? nonzero + at : nullptr, first < last ? size : 0};  // past the last, it again
      for (int64_t i = 0; i < words; ++i) split(values, i * kTileRows, half, b.plus + 8 * i);
      values.minus = true;
      for (int64_t i = 0; zeros && i < words; ++i) split(values, i * kTileRows, half, b.minus + 8 * i);
    }
    meet_values<vectors, zeros>(b, begin, words);
  }
  for (int64_t row = 0; !zeros && row < b.rows; ++row) {  // without zeros twice the positive ones, less all
    const __m256i set = _mm256_set1_epi32(b.count[row]);
    int32_t* whole = b.whole + row * kColumns;
    for (int i = 0; i < 32 * vectors; i += 8) {
      const __m256i x = load_bits(whole + i);
      store_bits(whole + i, _mm256_sub_epi32(_mm256_add_epi32(x, x), set));
    }
  }
  (t.p.bits.heads ? put_levels : put_floats)(b, tile * kTileRows, channels);
}

}  // namespace

void make_contexts_avx2(const AttentionBlock& b) {
  const AttentionTask& t = b.t;
  const int64_t size = b.batch * tile_count(t.p.e) * t.map_words * kTileRows;
  const int32_t* sign = t.v_sign + size;
  const bool zeros = t.v_zeros[b.batch];
  const int32_t* nonzero = zeros ? t.v_nonzero + size : nullptr;
  for (int64_t channel = 0; channel < t.p.e; channel += kColumns) {
    const int64_t channels = std::min(kColumns, t.p.e - channel), tile = channel / kTileRows;
    if (channels > 32) {
      (zeros ? make_context<2, true> : make_context<2, false>)(b, sign, nonzero, tile, channels);
    } else {
      (zeros ? make_context<1, true> : make_context<1, false>)(b, sign, nonzero, tile, channels);
    }
  }
}

}  // namespace bitmill::detail

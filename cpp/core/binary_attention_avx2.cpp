// SPDX-License-Identifier: Apache-2.0
// Binary attention with AVX2: the scores of 32 keys are bytes of one vector, which one comparison makes a word of the
// map. Bit-equal to the generic form, which takes heads too wide for bytes.
#include "binary_attention_avx2.h"

#include <algorithm>

#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kMostColumnsWithZeros = 127;   // d - dot fits into a byte
constexpr uint8_t kFar = 255;                    // of a dropped key: farther than any other
constexpr int64_t kWeights = int64_t{kFar} + 1;  // of the elastic rule, of every distance

// The keys that are nearer than `bound`.
uint32_t nearer(__m256i distance, __m256i bound) {
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(distance, bound), distance)));
}

// Distances of all rows to the keys of map words w and, for two vectors, w + 1: kept, or decided at once.
template <int vectors, bool zeros>
void meet_keys(const Block& b, int64_t w) {
  const AttentionTask& t = b.t;
  const int64_t d = t.p.d, map_words = t.map_words;
  const __m256i start = _mm256_set1_epi8(zeros ? static_cast<char>(d) : 0);
  const __m256i bound = _mm256_set1_epi8(static_cast<char>(zeros ? d : (d + 1) / 2));  // of a dot above 0
  const auto put = [&](int64_t row, int64_t word, __m256i y) {
    if (b.distance) return store_bits(b.distance + 32 * (row * map_words + word), y);
    b.bits[row * map_words + word] = nearer(y, bound) & b.keep[row][word];
  };
  const auto put_row = [&](int64_t row, const Row& y) {
    put(row, w, y.c0);
    if constexpr (vectors > 1) put(row, w + 1, y.c1);
  };
  for (int64_t row = 0; row < b.rows; row += kRows) {
    const auto sums =
        sum_up<vectors, zeros>(b.offsets + row * b.next_offsets, b.next_offsets, {b.plus, b.minus}, t.words, start);
    put_row(row, sums.r0);
    put_row(row + 1, sums.r1);
    put_row(row + 2, sums.r2);
    put_row(row + 3, sums.r3);
  }
}

void meet_all_keys(const Block& b, const int32_t* sign, const int32_t* nonzero) {
  const AttentionTask& t = b.t;
  const int64_t tile = t.words * kTileRows;
  for (int64_t w = 0; w < t.map_words; w += 2) {
    const int vectors = w + 1 < t.map_words ? 2 : 1;
    for (int half = 0; half < vectors; ++half) {
      const int64_t at = 2 * (w + half) * tile;
      Signs keys{sign + at, nonzero ? nonzero + at : nullptr, tile};
      for (int64_t i = 0; i < t.words; ++i) split(keys, i * kTileRows, half, b.plus + 8 * i);
      keys.minus = true;
      for (int64_t i = 0; b.zeros && i < t.words; ++i) split(keys, i * kTileRows, half, b.minus + 8 * i);
    }
    if (b.zeros) {
      (vectors > 1 ? meet_keys<2, true> : meet_keys<1, true>)(b, w);
    } else {
      (vectors > 1 ? meet_keys<2, false> : meet_keys<1, false>)(b, w);
    }
  }
}

// A byte of ones for every bit.
__m256i to_bytes(uint32_t bits) {
  const __m256i byte_of = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                           2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit_of), bit_of);
}

int32_t least(__m256i bytes) {
  const __m128i half = _mm_min_epu8(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  return _mm_extract_epi16(_mm_minpos_epu16(_mm_min_epu8(half, _mm_srli_epi16(half, 8))), 0);
}

// How far a key may not be to be active: the first distance whose weight is not above the threshold's share of the sum.
int32_t elastic_bound(const AttentionTask& t, const uint8_t* distance, int32_t nearest, const int64_t* weights) {
  const int64_t* weight = weights - nearest;
  int64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < 32 * t.map_words; i += 4) {  // a dropped key weighs 0
    s0 += weight[distance[i]];
    s1 += weight[distance[i + 1]];
    s2 += weight[distance[i + 2]];
    s3 += weight[distance[i + 3]];
    asm volatile("" : "+r"(s0), "+r"(s1), "+r"(s2), "+r"(s3));  // g++ would gather vectors element by element
  }
  const double share = t.p.threshold * static_cast<double>(s0 + s1 + s2 + s3);
  int32_t bound = nearest;
  while (bound<kFar&& static_cast<double>(weight[bound])> share) ++bound;
  return bound;
}

// The map of one row from its distances, by the rules that look at all of them.
void decide_row(const Block& b, int64_t row, const int64_t* weights) {
  const AttentionTask& t = b.t;
  const int32_t d = static_cast<int32_t>(t.p.d);
  uint8_t* distance = b.distance + row * 32 * t.map_words;
  __m256i low = _mm256_set1_epi8(static_cast<char>(kFar));
  for (int64_t w = 0; w < t.map_words; ++w) {
    const __m256i dropped = _mm256_andnot_si256(to_bytes(b.keep[row][w]), _mm256_set1_epi8(static_cast<char>(kFar)));
    const __m256i y = _mm256_or_si256(load_bits(distance + 32 * w), dropped);
    store_bits(distance + 32 * w, y);
    low = _mm256_min_epu8(low, y);
  }
  const int32_t nearest = least(low);
  int32_t bound = 0;  // nothing, if every key is dropped
  if (nearest < kFar && t.p.rule == AttentionRule::softmax_aware) {
    const int32_t lowest = t.lowest[(b.zeros ? d - nearest : d - 2 * nearest) + d];
    bound = (b.zeros ? d - lowest : (d - lowest) >> 1) + 1;
  } else if (nearest < kFar) {
    bound = elastic_bound(t, distance, nearest, weights);
  }
  const __m256i bounds = _mm256_set1_epi8(static_cast<char>(bound));
  for (int64_t w = 0; w < t.map_words; ++w) {
    b.bits[row * t.map_words + w] = nearer(load_bits(distance + 32 * w), bounds);
  }
}

// The maps of all rows, of rules that look at whole rows.
void decide_rows(const Block& b) {
  const AttentionTask& t = b.t;
  if (t.biased) {  // in floats
    const Scratch<int32_t> dot(32 * t.map_words);
    const int32_t d = static_cast<int32_t>(t.p.d), unit = b.zeros ? 1 : 2;
    for (int64_t row = 0; row < b.rows; ++row) {
      const uint8_t* distance = b.distance + row * 32 * t.map_words;
      for (int64_t j = 0; j < 32 * t.map_words; ++j) dot[j] = d - unit * distance[j];
      decide(t, b.batch, b.first + row, dot.get(), b.bits + row * t.map_words);
    }
    return;
  }
  int64_t weights[kWeights] = {};
  if (t.p.rule == AttentionRule::elastic) {
    for (int64_t i = 0; i <= (b.zeros ? 2 : 1) * t.p.d; ++i) weights[i] = t.weight[b.zeros ? i : 2 * i];
  }
  for (int64_t row = 0; row < b.rows; ++row) decide_row(b, row, weights);
}

}  // namespace

void attention_rows_avx2(const AttentionTask& t, int64_t batch, int64_t first, int64_t last) {
  const int64_t rows = last - first, room = ceil_div(rows, kRows) * kRows, words = t.words, map_words = t.map_words;
  if (words > kMostWords || map_words == 0) return attention_rows_generic(t, batch, first, last);
  const Scratch<int32_t> q(2 * rows * words);
  int32_t* q_nonzero = q.get() + rows * words;
  const bool zeros = pack_queries(t, batch, first, last, t.k_zeros[batch], q.get(), q_nonzero) || t.k_zeros[batch];
  if (zeros && t.p.d > kMostColumnsWithZeros) return attention_rows_generic(t, batch, first, last);

  const bool looks_back = t.biased || t.p.rule != AttentionRule::bool_;  // at the scores of a whole row
  const int64_t next_offsets = 8 * std::max(words, map_words);
  const Scratch<uint16_t> offsets(room * next_offsets);
  const Scratch<uint8_t> distance(looks_back ? room * 32 * map_words : 0);
  const Scratch<uint32_t> bits(room * map_words);
  const Scratch<Line> lines(2 * 8 * kMostWords);
  const Scratch<int32_t> whole(room * kColumns);
  const uint32_t* keep[kRowsTogether];
  int32_t count[kRowsTogether];
  float addend[kRowsTogether];
  for (int64_t row = 0; row < room; ++row) keep[row] = t.keep_of(batch, std::min(first + row, last - 1));
  const Block b{t,
                batch,
                first,
                rows,
                zeros,
                keep,
                next_offsets,
                offsets.get(),
                looks_back ? distance.get() : nullptr,
                bits.get(),
                count,
                addend,
                lines.get(),
                lines.get() + 8 * kMostWords,
                whole.get()};
  for (int64_t row = 0; row < room; ++row) {
    for (int64_t w = 0; w < words; ++w) {
      const int64_t at = std::min(row, rows - 1) * words + w;
      const uint32_t sign = static_cast<uint32_t>(q[at]), nonzero = zeros ? static_cast<uint32_t>(q_nonzero[at]) : 0;
      uint16_t* to = offsets.get() + row * next_offsets + 8 * w;
      zeros ? put_offsets(sign, nonzero, kBalance, to) : put_offsets(0, sign, 0, to);
    }
  }
  const int64_t keys = batch * key_tiles(t.p.m) * words * kTileRows;
  meet_all_keys(b, t.k_sign + keys, t.k_zeros[batch] ? t.k_nonzero + keys : nullptr);
  if (looks_back) decide_rows(b);

  ValueAddend value_addend(t.p, batch);
  for (int64_t row = 0; row < room; ++row) {
    const uint32_t* map = bits.get() + std::min(row, rows - 1) * map_words;
    count[row] = 0;
    for (int64_t w = 0; w < map_words; ++w) {
      count[row] += __builtin_popcount(map[w]);
      put_offsets(0, map[w], kBalance, offsets.get() + row * next_offsets + 8 * w);
    }
    if (row < rows) addend[row] = value_addend.of(map);
  }
  make_contexts_avx2(b);
}

}  // namespace bitmill::detail

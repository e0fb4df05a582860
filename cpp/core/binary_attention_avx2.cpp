// SPDX-License-Identifier: Apache-2.0
// Binary attention with AVX2, which cannot count bits. A vpshufb looks 4 columns of 32 keys up, in a table that 4 bits
// of a query choose, and their counts are summed in bytes: 32 scores in one vector, which one comparison makes a word
// of the map. The same steps with 4 bits of the map and 4 keys of 32 channels make the context. Four rows share what is
// loaded of 64 keys or channels. Bit-equal to the generic form, which takes heads too wide for bytes.
#include <algorithm>
#include <bit>

#include "avx2.h"
#include "binary_attention_task.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kRows = 4;                     // rows together
constexpr int64_t kColumns = 64;                 // keys or channels together: two vectors
constexpr int64_t kMostWords = 7;                // counts up to 7 * 32 fit into bytes
constexpr int64_t kMostSignedWords = 3;          // and so do those from -3 * 32 to 3 * 32
constexpr int64_t kMostColumnsWithZeros = 127;   // d - dot fits into a byte
constexpr uint8_t kFar = 255;                    // of a dropped key: farther than any other
constexpr int64_t kWeights = int64_t{kFar} + 1;  // of the elastic rule, of every distance

// Of 4 bits x, for lookups of 16 values of x at once.
struct Tables {
  alignas(64) uint8_t opposite[16][16];  // [s][x]: how many differ from s
  uint8_t balance[16][16][16];           // [s][z][x]: of those set in z, how many are not in s less how many are
};
constexpr Tables make_tables() {
  Tables tables{};
  for (unsigned s = 0; s < 16; ++s) {
    for (unsigned x = 0; x < 16; ++x) {
      tables.opposite[s][x] = static_cast<uint8_t>(std::popcount(s ^ x));
      for (unsigned z = 0; z < 16; ++z) {
        tables.balance[s][z][x] = static_cast<uint8_t>(std::popcount(x & z & ~s) - std::popcount(x & z & s));
      }
    }
  }
  return tables;
}
constexpr Tables kTables = make_tables();
constexpr int kBalance = sizeof(kTables.opposite);  // where they begin; those of s = 0 count bits set in z and in x

struct alignas(64) Line {
  uint8_t bytes[kColumns];
};

// Where the tables of the 8 times 4 bits of a word are: entries [high][low] of 16 bytes, after `base` bytes.
void put_offsets(uint32_t high, uint32_t low, int base, uint16_t* offsets) {
  const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), nibble = _mm256_set1_epi32(15);
  const auto nibbles = [&](uint32_t word) {
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts), nibble);
  };
  const __m256i entry = _mm256_or_si256(_mm256_slli_epi32(nibbles(high), 8), _mm256_slli_epi32(nibbles(low), 4));
  const __m256i at = _mm256_add_epi32(entry, _mm256_set1_epi32(base));
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(at), _mm256_extracti128_si256(at, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), packed);
}

// Two tiles of a plane of bits, or of the signs of one kind: those that are set, or those that are not, and not 0.
struct Signs {
  const int32_t *sign, *nonzero;  // `nonzero` is null if nothing is 0
  int64_t second;                 // words from the first tile to the second
  bool minus = false;

  __m256i words(int64_t at) const {
    __m256i x = load_bits(sign + at);
    if (minus) x = _mm256_xor_si256(x, _mm256_set1_epi32(-1));
    return nonzero ? _mm256_and_si256(x, load_bits(nonzero + at)) : x;
  }
};

// Word `at` of 32 rows to 8 vectors of 32 times 4 bits, the lowest columns first, one a line.
void split(const Signs& x, int64_t at, int half, Line* lines) {
  const auto put = [&](int byte, __m256i columns) {
    const __m256i nibble = _mm256_set1_epi8(15), ordered = in_order(columns);
    store_bits(lines[2 * byte].bytes + 32 * half, _mm256_and_si256(ordered, nibble));
    store_bits(lines[2 * byte + 1].bytes + 32 * half, _mm256_and_si256(_mm256_srli_epi16(ordered, 4), nibble));
  };
  split_bytes(x.words(at), x.words(at + 8), x.words(at + x.second), x.words(at + x.second + 8), put);
}

struct Row {  // named, not an array: g++ keeps an indexed array of accumulators in memory
  __m256i c0, c1;
};
struct Sums {
  Row r0, r1, r2, r3;
};

// What was split: bits, or with zeros the bits of +1 and those of -1.
struct Split {
  const Line *plus, *minus;
};

template <int vectors, bool zeros>
[[gnu::always_inline]] inline void step(Row& row, uint16_t offset, __m256i p0, __m256i p1, __m256i m0, __m256i m1) {
  const uint8_t* entry = &kTables.opposite[0][0] + offset;
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
  row.c0 = _mm256_add_epi8(row.c0, _mm256_shuffle_epi8(table, p0));
  if constexpr (zeros) row.c0 = _mm256_sub_epi8(row.c0, _mm256_shuffle_epi8(table, m0));
  settle(row.c0);  // keeps the steps of one sum together; otherwise g++ runs out of registers
  if constexpr (vectors > 1) {
    row.c1 = _mm256_add_epi8(row.c1, _mm256_shuffle_epi8(table, p1));
    if constexpr (zeros) row.c1 = _mm256_sub_epi8(row.c1, _mm256_shuffle_epi8(table, m1));
    settle(row.c1);
  }
}

// Sums over `words` words of four rows of offsets, `next` apart, from `start` on.
template <int vectors, bool zeros>
[[gnu::always_inline]] inline Sums sum_up(const uint16_t* offsets, int64_t next, const Split& split, int64_t words,
                                          __m256i start) {
  Row r0{start, start}, r1 = r0, r2 = r0, r3 = r0;
  const uint16_t *o0 = offsets, *o1 = o0 + next, *o2 = o1 + next, *o3 = o2 + next, *stop = o0 + 8 * words;
  const Line *plus = split.plus, *minus = split.minus;
  for (; o0 < stop; o0 += 4, o1 += 4, o2 += 4, o3 += 4, plus += 4, minus += 4) {
    asm("" : "+r"(o1), "+r"(o2), "+r"(o3));  // four pointers; otherwise g++ keeps twelve distances from o0
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i p0 = load_bits(plus[i].bytes), p1 = vectors > 1 ? load_bits(plus[i].bytes + 32) : p0;
      const __m256i m0 = zeros ? load_bits(minus[i].bytes) : p0,
                    m1 = zeros && vectors > 1 ? load_bits(minus[i].bytes + 32) : p0;
      step<vectors, zeros>(r0, o0[i], p0, p1, m0, m1);
      step<vectors, zeros>(r1, o1[i], p0, p1, m0, m1);
      step<vectors, zeros>(r2, o2[i], p0, p1, m0, m1);
      step<vectors, zeros>(r3, o3[i], p0, p1, m0, m1);
    }
  }
  return {r0, r1, r2, r3};
}

// Some rows of one matrix of the batch. With zeros in queries or keys a distance is d - dot, else (d - dot) / 2.
struct Block {
  const AttentionTask& t;
  int64_t batch, first, rows;  // the last four rows may reach past the end: they are computed, but not used
  bool zeros;
  const uint32_t* const* keep;  // [rows]
  uint16_t* offsets;            // [rows][8 max(words, map_words)], of the queries, and then of the map
  uint8_t* distance;            // [rows][32 map_words], or null: the rule looks at single keys
  uint32_t* bits;               // [rows][map_words], of the map
  int32_t* count;               // [rows], set bits
  float* addend;                // [rows], of the context
  Line *plus, *minus;           // [8 kMostWords]
  int32_t* whole;               // [rows][kColumns], of the context

  int64_t next_offsets() const { return 8 * (t.words > t.map_words ? t.words : t.map_words); }
  Split halves() const { return {plus, minus}; }
};

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
        sum_up<vectors, zeros>(b.offsets + row * b.next_offsets(), b.next_offsets(), b.halves(), t.words, start);
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
    const uint16_t* offsets = b.offsets + row * b.next_offsets() + 8 * begin;
    const auto sums = sum_up<vectors, zeros>(offsets, b.next_offsets(), b.halves(), words, zero);
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

void make_context(const Block& b) {
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

}  // namespace

void attention_rows_avx2(const AttentionTask& t, int64_t batch, int64_t first, int64_t last) {
  const int64_t rows = last - first, room = ceil_div(rows, kRows) * kRows, words = t.words, map_words = t.map_words;
  if (words > kMostWords || map_words == 0) return attention_rows_generic(t, batch, first, last);
  const Scratch<int32_t> q(2 * rows * words);
  int32_t* q_nonzero = q.get() + rows * words;
  const bool zeros = pack_queries(t, batch, first, last, t.k_zeros[batch], q.get(), q_nonzero) || t.k_zeros[batch];
  if (zeros && t.p.d > kMostColumnsWithZeros) return attention_rows_generic(t, batch, first, last);

  const bool looks_back = t.biased || t.p.rule != AttentionRule::bool_;  // at the scores of a whole row
  const Scratch<uint16_t> offsets(room * 8 * std::max(words, map_words));
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
      uint16_t* to = offsets.get() + row * b.next_offsets() + 8 * w;
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
      put_offsets(0, map[w], kBalance, offsets.get() + row * b.next_offsets() + 8 * w);
    }
    if (row < rows) addend[row] = value_addend.of(map);
  }
  make_context(b);
}

}  // namespace bitmill::detail

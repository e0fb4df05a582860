// SPDX-License-Identifier: Apache-2.0
// Binary attention with VPOPCNTDQ. Four rows of queries meet 32 keys at a time, a lane a key; a comparison makes their
// 32 bits of the map, which never leave the first-level cache; four rows of the map meet up to 64 channels, a lane a
// channel. Bit-equal to the generic form. Rules that need a row's largest score keep its scores, as integers,
// meanwhile.
#include <cstring>
#include <type_traits>

#include "avx512.h"
#include "binary_attention_task.h"
#include "bit_output_avx512.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill::detail {
namespace {

constexpr int kRows = 4;   // rows together
constexpr int kTiles = 4;  // tiles of channels together, at most

// Accumulators are named: g++ keeps an indexed array of them in memory.
struct Keys {  // distances of four rows to 32 keys
  __m512i a0, b0, a1, b1, a2, b2, a3, b3;
};
struct Channels {  // of one row
  __m512i c0, c1, c2, c3;
};

// The distance of bits: how many are opposite (dot = d - 2 distance), or with zeros -dot.
template <bool ternary>
__m512i add(__m512i sum, __m512i q, __m512i q_nonzero, __m512i k, __m512i k_nonzero) {
  if constexpr (ternary) {
    const __m512i present = _mm512_and_si512(q_nonzero, k_nonzero);
    const __m512i opposite = _mm512_popcnt_epi32(_mm512_ternarylogic_epi64(q, k, present, 0x28));  // (q ^ k) & present
    sum = _mm512_add_epi32(sum, _mm512_add_epi32(opposite, opposite));
    sum = _mm512_sub_epi32(sum, _mm512_popcnt_epi32(present));
  } else {
    sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(q, k)));
  }
  asm volatile("" : "+v"(sum));  // keeps the steps of one sum together; otherwise g++ runs out of registers
  return sum;
}

// Distances of the four rows q [4][words] to the two tiles k.
template <int fixed_words, bool ternary>
[[gnu::always_inline]] inline Keys distances(const int32_t* q, const int32_t* qn, const int32_t* k, const int32_t* kn,
                                             int64_t any_words) {
  const int64_t words = fixed_words ? fixed_words : any_words, tile = words * kTileRows;
  const __m512i zero = _mm512_setzero_si512();
  __m512i a0 = zero, b0 = zero, a1 = zero, b1 = zero, a2 = zero, b2 = zero, a3 = zero, b3 = zero;
  for (int64_t w = 0; w < words; ++w) {
    const __m512i ka = _mm512_loadu_si512(k + w * kTileRows), kb = _mm512_loadu_si512(k + tile + w * kTileRows);
    const __m512i na = ternary ? _mm512_loadu_si512(kn + w * kTileRows) : ka;
    const __m512i nb = ternary ? _mm512_loadu_si512(kn + tile + w * kTileRows) : kb;
    const __m512i q0 = _mm512_set1_epi32(q[w]), n0 = ternary ? _mm512_set1_epi32(qn[w]) : q0;
    a0 = add<ternary>(a0, q0, n0, ka, na), b0 = add<ternary>(b0, q0, n0, kb, nb);
    const __m512i q1 = _mm512_set1_epi32(q[words + w]), n1 = ternary ? _mm512_set1_epi32(qn[words + w]) : q1;
    a1 = add<ternary>(a1, q1, n1, ka, na), b1 = add<ternary>(b1, q1, n1, kb, nb);
    const __m512i q2 = _mm512_set1_epi32(q[2 * words + w]), n2 = ternary ? _mm512_set1_epi32(qn[2 * words + w]) : q2;
    a2 = add<ternary>(a2, q2, n2, ka, na), b2 = add<ternary>(b2, q2, n2, kb, nb);
    const __m512i q3 = _mm512_set1_epi32(q[3 * words + w]), n3 = ternary ? _mm512_set1_epi32(qn[3 * words + w]) : q3;
    a3 = add<ternary>(a3, q3, n3, ka, na), b3 = add<ternary>(b3, q3, n3, kb, nb);
  }
  return {a0, b0, a1, b1, a2, b2, a3, b3};
}

// What four rows share.
struct Block {
  const AttentionTask& t;
  const int32_t *q, *q_nonzero;  // [4][words]
  const int32_t *k, *k_nonzero;
  const uint32_t* keep[kRows];
  uint32_t* bits[kRows];  // of the map
  int32_t* count;         // [4], set bits
  float* addend;          // [4], of the context
};

// 32 keys of one row: those at most `limit` away.
[[gnu::always_inline]] inline void put_bits(const Block& b, int row, int64_t w, __m512i low, __m512i high,
                                            __m512i limit) {
  const __mmask16 first = _mm512_cmple_epi32_mask(low, limit), second = _mm512_cmple_epi32_mask(high, limit);
  const uint32_t word = _cvtmask32_u32(_mm512_kunpackw(second, first)) & b.keep[row][w];
  b.bits[row][w] = word;
  b.count[row] += _mm_popcnt_u32(word);
}

// BiBERT's rule: dot > 0.
template <int words, bool ternary>
void decide_bool(const Block& b) {
  const int64_t tiles = 2 * b.t.words * kTileRows;
  const __m512i limit = _mm512_set1_epi32(ternary ? -1 : static_cast<int>((b.t.p.d - 1) / 2));
  for (int64_t w = 0; w < b.t.map_words; ++w) {
    const Keys s = distances<words, ternary>(b.q, b.q_nonzero, b.k + w * tiles, b.k_nonzero + w * tiles, b.t.words);
    put_bits(b, 0, w, s.a0, s.b0, limit);
    put_bits(b, 1, w, s.a1, s.b1, limit);
    put_bits(b, 2, w, s.a2, s.b2, limit);
    put_bits(b, 3, w, s.a3, s.b3, limit);
  }
}

[[gnu::always_inline]] inline void put_distances(const Block& b, int row, int64_t w, __m512i low, __m512i high,
                                                 __m512i far, int32_t* out) {
  const uint32_t keep = b.keep[row][w];
  int32_t* to = out + 32 * (row * b.t.map_words + w);
  _mm512_storeu_si512(to, _mm512_mask_mov_epi32(far, static_cast<__mmask16>(keep), low));
  _mm512_storeu_si512(to + kTileRows, _mm512_mask_mov_epi32(far, static_cast<__mmask16>(keep >> 16), high));
}

// Distances [4][32 map_words] to memory; those of keys that are not attended are `far`.
template <int words, bool ternary>
void keep_distances(const Block& b, int32_t far, int32_t* out) {
  const int64_t tiles = 2 * b.t.words * kTileRows;
  const __m512i dropped = _mm512_set1_epi32(far);
  for (int64_t w = 0; w < b.t.map_words; ++w) {
    const Keys s = distances<words, ternary>(b.q, b.q_nonzero, b.k + w * tiles, b.k_nonzero + w * tiles, b.t.words);
    put_distances(b, 0, w, s.a0, s.b0, dropped, out);
    put_distances(b, 1, w, s.a1, s.b1, dropped, out);
    put_distances(b, 2, w, s.a2, s.b2, dropped, out);
    put_distances(b, 3, w, s.a3, s.b3, dropped, out);
  }
}

// How far a key may be to be active: those whose weight is more than the threshold's share of the sum.
template <bool ternary>
int32_t elastic_limit(const AttentionTask& t, const int32_t* distance, int32_t nearest) {
  // one dot less is one distance more with zeros, half of one without; unsigned, so that an index is one load
  using Index = std::conditional_t<ternary, int64_t, uint32_t>;
  const int64_t* weight = (ternary ? t.weight : t.weight_of_pair) - nearest;
  int64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (int64_t i = 0; i < 32 * t.map_words; i += 4) {  // a dropped key weighs 0
    s0 += weight[static_cast<Index>(distance[i])];
    s1 += weight[static_cast<Index>(distance[i + 1])];
    s2 += weight[static_cast<Index>(distance[i + 2])];
    s3 += weight[static_cast<Index>(distance[i + 3])];
    asm volatile("" : "+r"(s0), "+r"(s1), "+r"(s2), "+r"(s3));  // g++ would gather vectors element by element
  }
  const double share = t.p.threshold * static_cast<double>(s0 + s1 + s2 + s3);
  // whole numbers: above `share` is above its floor; nothing is heavier than kWeightOne, and NaN admits nothing
  const int64_t bound = static_cast<int64_t>(share < kWeightOne ? share : kWeightOne);
  int32_t limit = nearest - 1;
  while (weight[limit + 1] > bound) ++limit;
  return limit;
}

// The map of one row from its distances, by the rules that look at all of them.
template <bool ternary>
int32_t decide_row(const Block& b, int row, const int32_t* distance, int32_t far) {
  const AttentionTask& t = b.t;
  const int32_t d = static_cast<int32_t>(t.p.d);
  __m512i least = _mm512_set1_epi32(far);
  for (int64_t i = 0; i < 32 * t.map_words; i += kTileRows) {
    least = _mm512_min_epi32(least, _mm512_loadu_si512(distance + i));
  }
  const int32_t nearest = _mm512_reduce_min_epi32(least);
  int32_t limit = nearest - 1;  // nothing, if every key is dropped
  if (nearest < far && t.p.rule == AttentionRule::softmax_aware) {
    const int32_t lowest = t.lowest[(ternary ? -nearest : d - 2 * nearest) + d];
    limit = ternary ? -lowest : (d - lowest) >> 1;
  } else if (nearest < far) {
    limit = elastic_limit<ternary>(t, distance, nearest);
  }
  const __m512i bound = _mm512_set1_epi32(limit);
  for (int64_t w = 0; w < t.map_words; ++w) {
    const int32_t* at = distance + 32 * w;
    put_bits(b, row, w, _mm512_loadu_si512(at), _mm512_loadu_si512(at + kTileRows), bound);
  }
  return b.count[row];
}

// Distances to dots, for rules with a bias, which are decided in floats.
void to_dots(const AttentionTask& t, bool ternary, int32_t* distance) {
  const __m512i d = _mm512_set1_epi32(ternary ? 0 : static_cast<int>(t.p.d));
  for (int64_t i = 0; i < kRows * 32 * t.map_words; i += kTileRows) {
    const __m512i y = _mm512_loadu_si512(distance + i);
    _mm512_storeu_si512(distance + i, _mm512_sub_epi32(d, ternary ? y : _mm512_add_epi32(y, y)));
  }
}

template <int words, bool ternary>
void make_map(const Block& b, int64_t batch, int64_t row, int64_t rows, int32_t* distance, double* weight) {
  const AttentionTask& t = b.t;
  if (t.p.rule == AttentionRule::bool_ && !t.biased) return decide_bool<words, ternary>(b);
  // so far that every rule's weight of it is 0, whatever the nearest key of the row
  const int32_t far = static_cast<int32_t>(ternary ? 3 * t.p.d + 1 : 2 * t.p.d + 1);
  keep_distances<words, ternary>(b, far, distance);
  if (t.biased) to_dots(t, ternary, distance);
  for (int r = 0; r < rows; ++r) {
    const int32_t* of_row = distance + r * 32 * t.map_words;
    b.count[r] = t.biased ? decide_biased_avx512(t, batch, row + r, of_row, b.bits[r], weight)
                          : decide_row<ternary>(b, r, of_row, far);
  }
}

template <bool ternary>
__m512i add_values(__m512i sum, __m512i map, __m512i sign, __m512i nonzero) {
  const __m512i positive = _mm512_popcnt_epi32(_mm512_and_si512(map, sign));
  sum = _mm512_add_epi32(sum, positive);
  if constexpr (ternary) {  // twice the positive ones, less all
    sum = _mm512_add_epi32(sum, positive);
    sum = _mm512_sub_epi32(sum, _mm512_popcnt_epi32(_mm512_and_si512(map, nonzero)));
  }
  asm volatile("" : "+v"(sum));
  return sum;
}

template <int tiles, bool ternary>
void add_word(Channels& row, uint32_t bits, __m512i s0, __m512i s1, __m512i s2, __m512i s3, __m512i z0, __m512i z1,
              __m512i z2, __m512i z3) {
  const __m512i map = _mm512_set1_epi32(static_cast<int>(bits));
  row.c0 = add_values<ternary>(row.c0, map, s0, z0);
  if constexpr (tiles > 1) row.c1 = add_values<ternary>(row.c1, map, s1, z1);
  if constexpr (tiles > 2) row.c2 = add_values<ternary>(row.c2, map, s2, z2);
  if constexpr (tiles > 3) row.c3 = add_values<ternary>(row.c3, map, s3, z3);
}

// Ranges of up to four tiles of channels.
template <int tiles>
struct Levels4 {
  Range range[tiles];

  Levels4(const int32_t* ranges, int64_t n) {
    for (int t = 0; t < tiles; ++t) range[t] = load_range(ranges + t * kTileRows, n, 0xFFFF);
  }
  [[gnu::always_inline]] uint64_t operator()(const Channels& c) const {
    constexpr __mmask16 all = 0xFFFF, none = 0;
    return join(inside(all, range[0], c.c0), tiles > 1 ? inside(all, range[tiles > 1 ? 1 : 0], c.c1) : none,
                tiles > 2 ? inside(all, range[tiles > 2 ? 2 : 0], c.c2) : none,
                tiles > 3 ? inside(all, range[tiles > 3 ? 3 : 0], c.c3) : none);
  }
};

// The whole numbers of four rows as bits of the next layer.
template <int tiles>
void put_levels(const Block& b, const Channels& r0, const Channels& r1, const Channels& r2, const Channels& r3,
                int64_t rows, int64_t channel, int64_t batch, int64_t row) {
  const AttentionBits& bits = b.t.p.bits;
  const int64_t n = bits.heads * b.t.p.e, column = batch % bits.heads * b.t.p.e + channel;
  const int64_t at = (bits.q_first[b.t.sequence(batch)] + row) * (n / 8) + column / 8;
  const Levels4<tiles> positive(bits.out.positive + column, n);
  const Levels4<tiles> negative((bits.out.nonzero ? bits.out.negative : bits.out.positive) + column, n);
  const auto put = [&](int r, const Channels& c) {
    if (r >= rows) return;
    const uint64_t above = positive(c), present = above | negative(c);
    std::memcpy(reinterpret_cast<char*>(bits.out.sign) + at + r * (n / 8), &above, 2 * tiles);
    if (bits.out.nonzero) {
      std::memcpy(reinterpret_cast<char*>(bits.out.nonzero) + at + r * (n / 8), &present, 2 * tiles);
    }
  };
  put(0, r0);
  put(1, r1);
  put(2, r2);
  put(3, r3);
}

template <bool ternary>
__m512i to_whole(__m512i sum, int32_t set) {
  return ternary ? sum : _mm512_sub_epi32(_mm512_add_epi32(sum, sum), _mm512_set1_epi32(set));
}

// `tiles` tiles of channels of four rows; only the last tile may be cut to `lanes`.
template <int tiles, bool ternary>
void context(const Block& b, const int32_t* sign, const int32_t* nonzero, int64_t rows, int64_t channel,
             __mmask16 lanes, int64_t batch, int64_t row) {
  const AttentionTask& t = b.t;
  const int64_t next = t.map_words * kTileRows;
  const __m512i zero = _mm512_setzero_si512();
  const uint32_t *bits0 = b.bits[0], *bits1 = b.bits[1], *bits2 = b.bits[2], *bits3 = b.bits[3];
  Channels r0{zero, zero, zero, zero}, r1 = r0, r2 = r0, r3 = r0;
  for (int64_t w = 0; w < t.map_words; ++w) {
    const auto load = [&](const int32_t* plane, int tile, bool use) {
      return use ? _mm512_loadu_si512(plane + tile * next + w * kTileRows) : zero;
    };
    const __m512i s0 = load(sign, 0, true), s1 = load(sign, 1, tiles > 1), s2 = load(sign, 2, tiles > 2),
                  s3 = load(sign, 3, tiles > 3);
    const __m512i z0 = load(nonzero, 0, ternary), z1 = load(nonzero, 1, ternary && tiles > 1),
                  z2 = load(nonzero, 2, ternary && tiles > 2), z3 = load(nonzero, 3, ternary && tiles > 3);
    add_word<tiles, ternary>(r0, bits0[w], s0, s1, s2, s3, z0, z1, z2, z3);
    add_word<tiles, ternary>(r1, bits1[w], s0, s1, s2, s3, z0, z1, z2, z3);
    add_word<tiles, ternary>(r2, bits2[w], s0, s1, s2, s3, z0, z1, z2, z3);
    add_word<tiles, ternary>(r3, bits3[w], s0, s1, s2, s3, z0, z1, z2, z3);
  }
  if (t.p.bits.heads) {
    const auto whole = [&](const Channels& c, int r) -> Channels {
      const int32_t set = b.count[r];
      return {to_whole<ternary>(c.c0, set), to_whole<ternary>(c.c1, set), to_whole<ternary>(c.c2, set),
              to_whole<ternary>(c.c3, set)};
    };
    return put_levels<tiles>(b, whole(r0, 0), whole(r1, 1), whole(r2, 2), whole(r3, 3), rows, channel, batch, row);
  }
  const __m512 step = _mm512_set1_ps(t.p.step);
  // copies: sums whose address is taken stay in memory
  with_dtype(t.p.dtype, t.p.out, [&, r0, r1, r2, r3](auto* out) {
    auto* to = out + t.p.out_offset[batch] + row * t.p.out_row_stride + channel;
    const auto put = [&](int r, Channels c) {
      if (r >= rows) return;
      const auto finish = [&](int tile, __m512i sum) {
        const __m512 value = _mm512_mul_ps(step, _mm512_cvtepi32_ps(to_whole<ternary>(sum, b.count[r])));
        const __m512 added = _mm512_add_ps(value, _mm512_set1_ps(b.addend[r]));
        store16(to + r * t.p.out_row_stride + tile * kTileRows, tile + 1 < tiles ? __mmask16{0xFFFF} : lanes, added);
      };
      finish(0, c.c0);
      if constexpr (tiles > 1) finish(1, c.c1);
      if constexpr (tiles > 2) finish(2, c.c2);
      if constexpr (tiles > 3) finish(3, c.c3);
    };
    put(0, r0);
    put(1, r1);
    put(2, r2);
    put(3, r3);
  });
}

template <bool ternary>
void make_context(const Block& b, int64_t batch, int64_t row, int64_t rows) {
  const AttentionTask& t = b.t;
  const int64_t size = t.map_words * kTileRows, tiles = tile_count(t.p.e);
  const int32_t* sign = t.v_sign + batch * tiles * size;
  const int32_t* nonzero = ternary ? t.v_nonzero + batch * tiles * size : nullptr;
  for (int64_t tile = 0; tile < tiles; tile += kTiles) {
    const int64_t channel = tile * kTileRows, left = tiles - tile;
    const __mmask16 lanes = first_lanes(t.p.e - (tiles - 1) * kTileRows);
    const int32_t *s = sign + tile * size, *z = ternary ? nonzero + tile * size : nullptr;
    if (left > 4) context<4, ternary>(b, s, z, rows, channel, __mmask16{0xFFFF}, batch, row);
    if (left == 4) context<4, ternary>(b, s, z, rows, channel, lanes, batch, row);
    if (left == 3) context<3, ternary>(b, s, z, rows, channel, lanes, batch, row);
    if (left == 2) context<2, ternary>(b, s, z, rows, channel, lanes, batch, row);
    if (left == 1) context<1, ternary>(b, s, z, rows, channel, lanes, batch, row);
  }
}

}  // namespace

void attention_rows_avx512(const AttentionTask& t, int64_t batch, int64_t first, int64_t last) {
  const bool looks_back = t.biased || t.p.rule != AttentionRule::bool_;  // at the scores of a whole row
  const int64_t distances = looks_back ? kRows * 32 * t.map_words : 0;
  const int64_t queries = kRowsTogether * t.words, map = kRows * t.map_words;
  const int64_t keys = key_tiles(t.p.m) * t.words * kTileRows;
  const Scratch<int32_t> scratch(2 * queries + map + distances, 0);
  const bool weighs = t.biased && t.p.rule == AttentionRule::elastic;
  const Scratch<double> weight(weighs ? 32 * t.map_words : 0);
  int32_t *q = scratch.get(), *q_nonzero = q + queries, *distance = q_nonzero + queries + map;
  uint32_t* bits = reinterpret_cast<uint32_t*>(q_nonzero + queries);
  const bool zeros = pack_queries(t, batch, first, last, t.k_zeros[batch], q, q_nonzero) || t.k_zeros[batch];
  const int32_t* k_nonzero = t.k_nonzero ? t.k_nonzero + batch * keys : nullptr;
  ValueAddend value_addend(t.p, batch);
  const bool only_queries = zeros && !t.k_zeros[batch];
  const Scratch<int32_t> ones(only_queries ? keys : 0, -1);
  if (only_queries) k_nonzero = ones;
  for (int64_t row = first; row < last; row += kRows) {  // rows past the last are computed, but not written
    const int64_t rows = std::min<int64_t>(kRows, last - row), at = (row - first) * t.words;
    int32_t count[kRows] = {};
    float addend[kRows] = {};
    Block b{t, q + at, q_nonzero + at, t.k_sign + batch * keys, k_nonzero, {}, {}, count, addend};
    for (int r = 0; r < kRows; ++r) {
      b.keep[r] = t.keep_of(batch, std::min(row + r, last - 1));
      b.bits[r] = bits + r * t.map_words;
    }
    if (zeros) {
      make_map<0, true>(b, batch, row, rows, distance, weight.get());
    } else if (t.words == 1) {
      make_map<1, false>(b, batch, row, rows, distance, weight.get());
    } else if (t.words == 2) {
      make_map<2, false>(b, batch, row, rows, distance, weight.get());
    } else {
      make_map<0, false>(b, batch, row, rows, distance, weight.get());
    }
    for (int r = 0; r < rows; ++r) addend[r] = value_addend.of(b.bits[r]);
    if (t.v_zeros[batch]) {
      make_context<true>(b, batch, row, rows);
    } else {
      make_context<false>(b, batch, row, rows);
    }
  }
}

}  // namespace bitmill::detail

// SPDX-License-Identifier: Apache-2.0
// The zoned product by table lookup (lookup_tables_avx512.h): three lookups for every 4 columns that are not salient
// (the signs b1, the zones t, and t b1), two for salient ones, and three more if they are split too; the scales come in
// once a block. 4 rows share the bits of a tile; a single row takes 4 tiles. The arithmetic of an output is the same
// either way.
#include <type_traits>

#include "avx512.h"
#include "layout.h"
#include "lookup_tables_avx512.h"
#include "scratch.h"
#include "zoned.h"

namespace bitmill::detail {
namespace {

constexpr int64_t kUnits = 4;             // outputs side by side: 4 rows of a tile, or 4 tiles of a row
constexpr int64_t kOctetFloats = 32;      // of the two tables of 8 columns
constexpr int64_t kPrefetchBytes = 1536;  // how far ahead a single row asks for its bits

// The 16 rows' bits of 8 columns, lowest first; what lies above them is of no account. Loads that begin at the octet
// would cross lines.
__m512i octet_of(const int32_t* tile, int64_t octet) {
  const __m512i word = _mm512_loadu_si512(tile + octet / 4 * kTileRows);
  return _mm512_srl_epi32(word, _mm_cvtsi32_si128(static_cast<int>(8 * (octet % 4))));
}

__m512i equal(__m512i a, __m512i b) { return _mm512_ternarylogic_epi32(a, b, b, 0xC3); }

// The table of 4 columns, loaded once, not by every lookup.
[[gnu::always_inline]] inline __m512 table_at(const float* table) {
  __m512 sums = _mm512_load_ps(table);
  asm volatile("" : "+v"(sums));
  return sums;
}

// Adds what 4 bits select. The sum stays in its register.
[[gnu::always_inline]] inline void look_up(__m512& sum, __m512i bits, __m512 table) {
  sum = _mm512_add_ps(sum, _mm512_permutexvar_ps(bits, table));
  asm volatile("" : "+v"(sum));
}

// The same on another unit: additions alone would wait for those that the lookups need.
[[gnu::always_inline]] inline void look_up_by_product(__m512& sum, __m512i bits, __m512 table) {
  sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(bits, table), _mm512_set1_ps(1.0f), sum);
  asm volatile("" : "+v"(sum));
}

// Bits of a tile's rows, those of 4 columns lowest.
struct Bits {
  __m512i sign, zone, split;

  // The next 4 columns of an octet: high products, which leave the units of the lookups to the lookups.
  // Not before the first 4 columns are done: registers run out.
  [[gnu::always_inline]] Bits next() const {
    const __m512i sixteenth = _mm512_set1_epi16(1 << 12);
    Bits b = *this;
    asm volatile("" : "+v"(b.sign), "+v"(b.zone), "+v"(b.split));
    return {_mm512_mulhi_epu16(b.sign, sixteenth), _mm512_mulhi_epu16(b.zone, sixteenth),
            _mm512_mulhi_epu16(b.split, sixteenth)};
  }
};

// Sums of +-x over the columns of a block that are not salient: by b1, t and t b1.
struct OtherSums {
  __m512 sign = _mm512_setzero_ps(), zone = sign, both = sign;

  [[gnu::always_inline]] void add(Bits bits, __m512 table) {
    look_up(sign, bits.sign, table);
    look_up_by_product(zone, bits.zone, table);
    look_up(both, equal(bits.sign, bits.zone), table);
  }
};

// Of salient columns: by b1 and b2.
struct SalientSums {
  __m512 first = _mm512_setzero_ps(), second = first;

  [[gnu::always_inline]] void add(Bits bits, __m512 table) {
    look_up(first, bits.sign, table);
    look_up_by_product(second, bits.zone, table);
  }
};

// Of salient columns that are split, besides: by t, t b1 and t b2.
struct SplitSums {
  __m512 zone = _mm512_setzero_ps(), first = zone, second = zone;

  [[gnu::always_inline]] void add(Bits bits, __m512 table) {
    look_up(zone, bits.split, table);
    look_up_by_product(first, equal(bits.sign, bits.split), table);
    look_up(second, equal(bits.zone, bits.split), table);
  }
};

struct Task {
  const ZonedMatmulParams& p;
  const ZonedPlan& plan;
  int64_t words, split_words, end;  // end: the first tile that belongs to somebody else
  int64_t row_floats;               // of the tables of a row
};

// The scales of a tile and block, one after the other.
template <class S>
struct Scales {
  const S* at;

  __m512 next() {
    const __m512 scale = load16(at);
    at += kTileRows;
    return scale;
  }
};

__m512 half_sum(__m512 a, __m512 b) { return _mm512_mul_ps(_mm512_add_ps(a, b), _mm512_set1_ps(0.5f)); }
__m512 half_difference(__m512 a, __m512 b) { return _mm512_mul_ps(_mm512_sub_ps(a, b), _mm512_set1_ps(0.5f)); }

// What the sums of a block add to the results. totals: the sums of x over the salient columns and over the others.
template <class S>
__m512 scaled(__m512 result, OtherSums s, Scales<S>& scales, bool centred, const float* totals) {
  const __m512 total = _mm512_set1_ps(totals[1]);
  if (centred) result = _mm512_fmadd_ps(scales.next(), half_difference(total, s.zone), result);
  result = _mm512_fmadd_ps(scales.next(), half_difference(s.sign, s.both), result);
  if (centred) result = _mm512_fmadd_ps(scales.next(), half_sum(total, s.zone), result);
  return _mm512_fmadd_ps(scales.next(), half_sum(s.sign, s.both), result);
}

template <class S>
__m512 scaled(__m512 result, SalientSums s, Scales<S>& scales, bool centred, const float* totals) {
  if (centred) result = _mm512_fmadd_ps(scales.next(), _mm512_set1_ps(totals[0]), result);
  result = _mm512_fmadd_ps(scales.next(), s.first, result);
  return _mm512_fmadd_ps(scales.next(), s.second, result);
}

template <class S>
__m512 scaled(__m512 result, SalientSums s, SplitSums z, Scales<S>& scales, bool centred, const float* totals) {
  const __m512 total = _mm512_set1_ps(totals[0]);
  if (centred) result = _mm512_fmadd_ps(scales.next(), half_difference(total, z.zone), result);
  result = _mm512_fmadd_ps(scales.next(), half_difference(s.first, z.first), result);
  result = _mm512_fmadd_ps(scales.next(), half_difference(s.second, z.second), result);
  if (centred) result = _mm512_fmadd_ps(scales.next(), half_sum(total, z.zone), result);
  result = _mm512_fmadd_ps(scales.next(), half_sum(s.first, z.first), result);
  return _mm512_fmadd_ps(scales.next(), half_sum(s.second, z.second), result);
}

// The bits of a tile.
struct Tile {
  const int32_t *sign, *zone, *split;

  Tile(const Task& task, int64_t tile) {
    const ZonedWeight& w = task.p.weight;
    const int64_t at = tile < task.end ? tile : task.end - 1;  // past the end the last one is repeated, unstored
    sign = w.sign + at * task.words * kTileRows;
    zone = w.zone + at * task.words * kTileRows;
    split = w.split ? w.salient_zone + at * task.split_words * kTileRows : nullptr;
  }

  void prefetch(int64_t octet) const {
    for (const int32_t* plane : {sign, zone}) {
      const char* at = reinterpret_cast<const char*>(plane + octet / 4 * kTileRows);
      _mm_prefetch(at + kPrefetchBytes, _MM_HINT_T1);
    }
  }
};

// Sums of 4 units over octets of a tile's bits, `table` moving on. rows: the units are rows with tables `row_floats`
// apart and the bits of one tile; else tiles with one table.
template <bool rows, class Sums>
struct FourSums {
  Sums s0, s1, s2, s3;

  static Bits bits(const Tile& tile, int64_t octet, int64_t split) {
    const __m512i sign = octet_of(tile.sign, octet), zone = octet_of(tile.zone, octet);
    if constexpr (std::is_same_v<Sums, SplitSums>) return {sign, zone, octet_of(tile.split, split)};
    return {sign, zone, _mm512_setzero_si512()};
  }

  // Octets [octet, end), of which those of the splits begin at `split`. The sums are copied to registers and back: g++
  // leaves those of an object in memory.
  void add(const Task& task, const Tile (&tile)[kUnits], int64_t octet, int64_t end, int64_t split, const float*& at) {
    Sums a = s0, b = s1, c = s2, d = s3;
    const float* table = at;
    const int64_t row = task.row_floats;
    for (; octet < end; ++octet, ++split, table += kOctetFloats) {
      if constexpr (rows) {
        const Bits low = bits(tile[0], octet, split);
        add_rows(a, b, c, d, low, table, row);
        add_rows(a, b, c, d, low.next(), table + 16, row);
      } else {
        if (octet % 4 == 0) {
          for (const Tile& t : tile) t.prefetch(octet);
        }
        const __m512 low = table_at(table), high = table_at(table + 16);
        add_tile(a, bits(tile[0], octet, split), low, high);
        add_tile(b, bits(tile[1], octet, split), low, high);
        add_tile(c, bits(tile[2], octet, split), low, high);
        add_tile(d, bits(tile[3], octet, split), low, high);
      }
    }
    s0 = a, s1 = b, s2 = c, s3 = d;
    at = table;
  }

  [[gnu::always_inline]] static void add_rows(Sums& a, Sums& b, Sums& c, Sums& d, Bits bits, const float* table,
                                              int64_t row) {
    a.add(bits, table_at(table));
    b.add(bits, table_at(table + row));
    c.add(bits, table_at(table + 2 * row));
    d.add(bits, table_at(table + 3 * row));
  }

  [[gnu::always_inline]] static void add_tile(Sums& sums, Bits bits, __m512 low, __m512 high) {
    sums.add(bits, low);
    sums.add(bits.next(), high);
  }
};

template <class T>
void finish(const Task& task, int64_t row, int64_t tile, __m512 value) {
  if (tile >= task.end) return;
  const ZonedMatmulParams& p = task.p;
  const int64_t column = tile * kTileRows;
  const __mmask16 lanes = first_lanes(p.weight.n - column);
  if (p.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, p.bias + column));
  store16(static_cast<T*>(p.out) + row * p.weight.n + column, lanes, value);
}

// 4 rows from `row` on of one tile, or one row of 4 tiles from `tile` on. totals: [blocks][2] of a row.
template <bool rows, bool split, class T, class S>
void block(const Task& task, int64_t row, int64_t tile, const float* tables, const float* totals) {
  const ZonedWeight& w = task.p.weight;
  const int64_t count = static_cast<int64_t>(task.plan.blocks.size()), step = rows ? 0 : 1;
  const Tile tiles[kUnits] = {{task, tile}, {task, tile + step}, {task, tile + 2 * step}, {task, tile + 3 * step}};
  __m512 r0 = _mm512_setzero_ps(), r1 = r0, r2 = r0, r3 = r0;
  for (int64_t i = 0; i < count; ++i, totals += 2) {
    const ZonedBlock& b = task.plan.blocks[i];
    const int64_t first = b.first / 8, others_begin = first + b.others_begin();
    FourSums<rows, SplitSums> splits;
    if constexpr (split) {
      const float* same = tables;
      splits.add(task, tiles, first, first + b.salient_octets(), b.split_first / 8, same);
    }
    FourSums<rows, SalientSums> salient;
    salient.add(task, tiles, first, first + b.salient_octets(), 0, tables);
    FourSums<rows, OtherSums> others;
    others.add(task, tiles, others_begin, others_begin + b.other_octets(), 0, tables);
    const auto add = [&](int64_t unit, __m512 result, const OtherSums& other, const SalientSums& more,
                         const SplitSums& zones) {
      const int64_t at = tile + unit * step < task.end ? tile + unit * step : task.end - 1;
      Scales<S> scales{static_cast<const S*>(w.scale) + (at * count + i) * w.scales() * kTileRows};
      const float* of_row = totals + (rows ? unit * 2 * count : 0);
      result = scaled(result, other, scales, w.centred, of_row);
      if constexpr (split) return scaled(result, more, zones, scales, w.centred, of_row);
      return scaled(result, more, scales, w.centred, of_row);
    };
    r0 = add(0, r0, others.s0, salient.s0, splits.s0), r1 = add(1, r1, others.s1, salient.s1, splits.s1);
    r2 = add(2, r2, others.s2, salient.s2, splits.s2), r3 = add(3, r3, others.s3, salient.s3, splits.s3);
  }
  const auto put = [&](int64_t unit, __m512 result) {
    finish<T>(task, row + (rows ? unit : 0), tile + unit * step, result);
  };
  put(0, r0), put(1, r1), put(2, r2), put(3, r3);
}

// One row of activations on its way to tables.
class Row {
 public:
  explicit Row(const Task& task)
      : task_(task),
        values_(task.p.weight.k + 1, 0),
        slots_(static_cast<int64_t>(task.plan.slots.size())),
        scale_(task.p.weight.k, 1) {
    const ZonedWeight& w = task.p.weight;
    if (!w.column_scale) return;
    with_dtype(w.scale_dtype, w.column_scale, [&](const auto* scale) {
      for (int64_t i = 0; i < w.k; ++i) scale_[i] = to_float(scale[i]);
    });
  }

  template <class T>
  void prepare(const T* x, float* tables, float* totals) {
    const int64_t k = task_.p.weight.k, slots = static_cast<int64_t>(task_.plan.slots.size());
    for (int64_t i = 0; i < k; ++i) values_[i] = to_float(x[i]) * scale_[i];
    for (int64_t i = 0; i < slots; ++i) slots_[i] = values_[task_.plan.slots[i]];
    build_tables(slots_.get(), slots, tables);
    const float* from = slots_;
    for (const ZonedBlock& b : task_.plan.blocks) {
      for (const int64_t octets : {b.salient_octets(), b.other_octets()}) {
        __m256 sum = _mm256_setzero_ps();
        for (int64_t i = 0; i < octets; ++i, from += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(from));
        *totals++ = _mm512_reduce_add_ps(_mm512_zextps256_ps512(sum));
      }
    }
  }

 private:
  const Task& task_;
  Scratch<float> values_;  // the last one is 0
  Scratch<float> slots_, scale_;
};

template <bool split, class T, class S>
void multiply(const Task& task, int64_t begin) {
  const ZonedMatmulParams& p = task.p;
  const int64_t k = p.weight.k, row_totals = 2 * static_cast<int64_t>(task.plan.blocks.size());
  Scratch<float> tables(kUnits * task.row_floats), totals(kUnits * row_totals);
  Row prepared(task);
  const T* x = static_cast<const T*>(p.x);
  const auto prepare = [&](int64_t row, int64_t unit) {
    prepared.prepare(x + row * k, tables + unit * task.row_floats, totals + unit * row_totals);
  };
  int64_t row = 0;
  for (; row + kUnits <= p.m; row += kUnits) {
    for (int64_t unit = 0; unit < kUnits; ++unit) prepare(row + unit, unit);
    for (int64_t tile = begin; tile < task.end; ++tile) {
      block<true, split, T, S>(task, row, tile, tables, totals);
    }
  }
  for (; row < p.m; ++row) {
    prepare(row, 0);
    for (int64_t tile = begin; tile < task.end; tile += kUnits) {
      block<false, split, T, S>(task, row, tile, tables, totals);
    }
  }
}

}  // namespace

void zoned_tiles_avx512(const ZonedMatmulParams& p, const ZonedPlan& plan, int64_t begin, int64_t end) {
  const ZonedWeight& w = p.weight;
  const int64_t floats = word_count(static_cast<int64_t>(plan.slots.size())) * kTableFloats;
  const Task task{p, plan, word_count(w.k), w.salient_zone_words, end, floats};
  with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const auto run = [&]<class S>(const S*) {
      w.split ? multiply<true, T, S>(task, begin) : multiply<false, T, S>(task, begin);
    };
    w.scale_dtype == Dtype::f32 ? run(static_cast<const float*>(nullptr)) : run(static_cast<const Float16*>(nullptr));
  });
}

}  // namespace bitmill::detail

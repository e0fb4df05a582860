// SPDX-License-Identifier: Apache-2.0
// The obvious form of the partially binarised product, the check of its arrays, and the choice of the instruction set.
#include "salient_scatter.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <memory>
#include <vector>

#include "binary_int8_matmul.h"
#include "binary_matmul.h"
#include "cpu.h"
#include "int8.h"
#include "layout.h"
#include "scratch.h"

namespace bitmill {
namespace {

using detail::Scratch;

// Activation rows that are prepared, and multiplied, together: what bounds the scratch memory. The last ones take what
// remains if that is less than kManyRows: a kernel for few rows, which may round otherwise, is for few rows in all.
constexpr int64_t kRowBlock = 256;

int64_t rows_together(int64_t left) { return left < kRowBlock + kManyRows ? left : kRowBlock; }

int64_t group_width(const SalientWeight& w) { return w.group_size > 0 ? w.group_size : std::max<int64_t>(w.k, 1); }
int64_t group_count(const SalientWeight& w) { return w.group_size > 0 ? ceil_div(w.k, w.group_size) : 1; }

// The columns below k of a word.
uint32_t columns_of_word(const SalientWeight& w, int64_t word) {
  const int64_t columns = w.k - 32 * word;
  return columns >= 32 ? ~0u : (1u << columns) - 1;
}

float binary_value(const SalientWeight& w, int64_t row, int64_t group, float sign) {
  const int64_t i = row * group_count(w) + group;
  const float scaled = w.alpha[i] * sign;
  return w.mu ? w.mu[i] + scaled : scaled;
}

// Element i of `value` as a weight of this row.
float salient_value(const SalientWeight& w, int64_t row, int64_t i) {
  if (!w.value_scale) return to_float(static_cast<const Float16*>(w.value)[i]);
  const uint8_t* codes = static_cast<const uint8_t*>(w.value);
  const int code = w.code_bits == 4 ? (codes[i / 2] >> (i % 2 * 4)) & 15 : codes[i];
  return w.value_scale[row] * (static_cast<float>(code) - w.value_zero[row]);
}

// Calls each(column, value) for the salient weights of a row, columns ascending. Stays within the arrays if their
// outline is right, whatever the bits are.
template <class Each>
void walk_row(const SalientWeight& w, int64_t row, const Each& each) {
  const int64_t tile = row / kTileRows, lane = row % kTileRows, words = word_count(w.k);
  if (w.encoding == SalientEncoding::bitmap) {
    int64_t entry = w.start[row];
    for (int64_t word = 0; word < words; ++word) {
      const int32_t mask = w.mask[(tile * words + word) * kTileRows + lane];
      uint32_t bits = static_cast<uint32_t>(mask) & columns_of_word(w, word);
      for (; bits && entry < w.start[row + 1]; bits &= bits - 1) {
        each(32 * word + std::countr_zero(bits), salient_value(w, row, entry++));
      }
    }
  } else if (w.encoding == SalientEncoding::list) {
    int64_t column = -1;
    for (int64_t step = w.start[tile]; step < w.start[tile + 1]; ++step) {
      const int64_t i = step * kTileRows + lane;
      column += w.gap[i] == kNoEntry ? kNoEntry : w.gap[i] + 1;
      if (w.gap[i] != kNoEntry && column < w.k) each(column, salient_value(w, row, i));
    }
  } else {
    const int64_t in_word = values_per_word(w.value_scale ? w.code_bits : 16);
    const int64_t value_words = ceil_div(w.entries, in_word);
    for (int64_t j = 0; j < w.entries; ++j) {
      const int64_t word = (tile * value_words + j / in_word) * kTileRows + lane;
      each(int64_t{w.column[j]}, salient_value(w, row, word * in_word + j % in_word));
    }
  }
}

// Sizes, `start` and `column`: what keeps every kernel within the arrays.
Status check_outline(const SalientWeight& w) {
  if (w.n < 0 || w.k < 0 || w.entries < 0 || w.k > kMaxColumns) return Status::bad_size;
  if (w.group_size < 0 || w.group_size % 32 != 0) return Status::bad_argument;
  if ((w.value_scale == nullptr) != (w.value_zero == nullptr)) return Status::bad_argument;
  if (w.code_bits != 8 && w.code_bits != 4) return Status::bad_argument;
  if (w.encoding == SalientEncoding::columns) {
    int64_t previous = -1;
    for (int64_t j = 0; j < w.entries; previous = w.column[j++]) {
      if (w.column[j] <= previous || w.column[j] >= w.k) return Status::corrupt;
    }
    return Status::ok;
  }
  const bool list = w.encoding == SalientEncoding::list;
  if (list && (w.k > detail::kMaxListColumns || (w.k == 0 && w.entries > 0))) return Status::bad_argument;
  const int64_t count = list ? tile_count(w.n) : w.n;
  const int64_t last = w.start[count];
  const bool spare = !list && w.value_scale && w.code_bits == 4 && last % 2 != 0;  // half of the last byte
  if (w.start[0] != 0 || last + spare != w.entries) return Status::corrupt;
  bool falls = false;  // no early end, so that the loop becomes vector code
  for (int64_t i = 0; i < count; ++i) falls |= w.start[i] > w.start[i + 1];
  return falls ? Status::corrupt : Status::ok;
}

bool row_is_consistent(const SalientWeight& w, int64_t row) {
  const int64_t tile = row / kTileRows, lane = row % kTileRows, words = word_count(w.k);
  const auto at = [&](int64_t word) { return (tile * words + word) * kTileRows + lane; };
  if (w.encoding == SalientEncoding::bitmap) {
    int64_t count = 0;
    uint32_t both = 0;
    for (int64_t word = 0; word < words; ++word) {
      const uint32_t bits = static_cast<uint32_t>(w.mask[at(word)]) & columns_of_word(w, word);
      count += std::popcount(bits);
      both |= bits & static_cast<uint32_t>(w.sign[at(word)]);
    }
    return !both && count == int64_t{w.start[row + 1]} - w.start[row];
  }
  if (w.encoding == SalientEncoding::list) {
    int64_t column = -1;
    for (int64_t step = w.start[tile]; step < w.start[tile + 1]; ++step) {
      const uint8_t gap = w.gap[step * kTileRows + lane];
      column += gap == kNoEntry ? kNoEntry : gap + 1;
      if (gap != kNoEntry && column >= w.k) return false;
    }
  }
  bool signs = false;
  walk_row(w, row, [&](int64_t column, float) {
    signs |= (static_cast<uint32_t>(w.sign[at(column / 32)]) >> (column % 32)) & 1u;
  });
  return !signs;
}

void widen(Dtype dtype, const void* x, int64_t count, float* out) {
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) return detail::widen_avx512(dtype, x, count, out);
#endif
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) return detail::widen_avx2(dtype, x, count, out);
#endif
  with_dtype(dtype, x, [&](const auto* values) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(values[i]);
  });
}

// What a product reads of `m` rows of x: float32, or int8.
struct Rows {
  const float* values = nullptr;  // null if `q` is read
  Scratch<float> floats, scale;
  Scratch<int8_t> q;
  Scratch<int32_t> total;

  Rows(const SalientMatmulParams& p, const void* x, int64_t m, bool as_floats)
      : floats(as_floats && (p.int8 || p.dtype != Dtype::f32) ? m * p.weight.k : 0),
        scale(p.int8 ? m : 0),
        q(p.int8 ? m * p.weight.k : 0),
        total(p.int8 ? m : 0) {
    const int64_t count = m * p.weight.k;
    if (as_floats) values = floats;
    if (p.int8) {
      Int8QuantizeParams rows;
      rows.x = x, rows.dtype = p.dtype;
      rows.m = m, rows.k = p.weight.k;
      rows.q = q, rows.scale = scale, rows.total = total;
      int8_quantize(rows);
      if (as_floats) std::copy_n(q.get(), count, floats.get());
    } else if (p.dtype == Dtype::f32) {
      values = static_cast<const float*>(x);
    } else {
      widen(p.dtype, x, count, floats);
    }
  }
};

struct Kernel {
  void (*tiles)(const detail::SalientTask&, int64_t, int64_t);
  double nanoseconds;  // of one salient weight and one row of activations
  bool reads_int8;
};

Kernel choose_kernel([[maybe_unused]] const SalientMatmulParams& p) {
  const SalientWeight& w = p.weight;
  [[maybe_unused]] const bool integers =
      p.int8 && w.value_scale && group_count(w) == 1 && w.k <= detail::kMaxInt8Columns;
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512 && has_int8_dot()) {  // VBMI2 is for float activations too
    if (integers) return {detail::salient_tiles_avx512vnni, 0.02, true};
    return {detail::salient_tiles_avx512, 0.05, false};
  }
#endif
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) {
    if (integers) return {detail::salient_tiles_int8_avx2, 0.05, true};
    return {detail::salient_tiles_avx2, 0.1, false};
  }
#endif
  return {detail::salient_tiles_generic, 1.0, false};
}

// 4-bit codes as bytes. Apart from their users, so that the compiler sees that nothing overlaps.
void spread_codes(const uint8_t* __restrict pairs, int64_t count, uint8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[2 * i] = pairs[i] & 15, out[2 * i + 1] = pairs[i] >> 4;
}

// One tile of columns, from words of 8 codes to words of 4.
void spread_columns(const uint32_t* __restrict pairs, int64_t words, uint32_t* __restrict out) {
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
      uint32_t four = pairs[word / 2 * kTileRows + lane] >> (word % 2 * 16) & 0xFFFF;
      four = (four | four << 8) & 0x00FF00FF;
      out[word * kTileRows + lane] = (four | four << 4) & 0x0F0F0F0F;
    }
  }
}

// The codes, as bytes, that lie before a tile.
int64_t codes_before(const SalientWeight& w, int64_t tile) {
  if (w.encoding == SalientEncoding::columns) return 4 * tile * word_count(w.entries, 8) * kTileRows;
  return w.encoding == SalientEncoding::list ? w.start[tile] * kTileRows : w.start[std::min(tile * kTileRows, w.n)];
}

// Tiles [begin, end) of a weight with 4-bit codes, for a kernel that reads bytes. A few rows of activations take some
// tiles at a time, whose bytes stay in the cache; many rows take all at once, because a kernel prepares them anew in
// every call.
void multiply_spread(const Kernel& kernel, const detail::SalientTask& task, int64_t begin, int64_t end) {
  constexpr int64_t kFewRows = 8, kCachedCodes = 1 << 16;
  const SalientWeight& w = task.weight;
  const int64_t most = task.m < kFewRows ? kCachedCodes : codes_before(w, end), words = word_count(w.entries, 8);
  std::unique_ptr<uint8_t[]> bytes;
  int64_t room = 0;
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t base = codes_before(w, first) / 2 * 2;
    last = first + 1;
    while (last < end && codes_before(w, last + 1) - base <= most) ++last;
    const int64_t codes = ceil_div(codes_before(w, last) - base, 2) * 2;
    if (codes > room) bytes = std::make_unique_for_overwrite<uint8_t[]>(room = codes);
    SalientWeight wide = w;
    wide.code_bits = 8;
    if (w.encoding == SalientEncoding::columns) {
      const auto* pairs = static_cast<const uint32_t*>(w.value);
      for (int64_t tile = first; tile < last; ++tile) {
        spread_columns(pairs + tile * word_count(w.entries, 4) * kTileRows, words,
                       reinterpret_cast<uint32_t*>(bytes.get()) + (tile - first) * words * kTileRows);
      }
    } else {
      spread_codes(static_cast<const uint8_t*>(w.value) + base / 2, codes / 2, bytes.get());
      if (w.encoding == SalientEncoding::bitmap) wide.entries = base + codes;
    }
    // The kernels count codes from the first one of all.
    wide.value = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(bytes.get()) - static_cast<uintptr_t>(base));
    kernel.tiles(
        {wide, task.m, task.groups, task.group_width, task.x, task.q, task.row_scale, task.total, task.out, task.first},
        first, last);
  }
}

// The sign plane's part of the product, without activations.
template <class Product>
Product sign_product(const SalientMatmulParams& p, int64_t m, Addend addend, void* out) {
  const SalientWeight& w = p.weight;
  Product signs;
  signs.weight = w.sign;
  signs.m = m, signs.n = w.n, signs.k = w.k;
  signs.scale = w.alpha, signs.group_size = w.group_size;
  signs.addend = addend, signs.bias = p.bias, signs.out = out;
  return signs;
}

// `m` rows from `row` on, tiles [begin, end), on this thread: the salient part, and the sign plane's with it.
void multiply_part(const SalientMatmulParams& p, const Kernel& kernel, int64_t row, int64_t m, int64_t begin,
                   int64_t end) {
  const SalientWeight& w = p.weight;
  const char* x = static_cast<const char*>(p.x) + row * w.k * bytes_of(p.dtype);
  char* out = static_cast<char*>(p.out) + row * w.n * bytes_of(p.dtype);
  const Rows rows(p, x, m, !p.int8 || !kernel.reads_int8);
  const Scratch<float> sums((end - begin) * m * kTileRows);
  const detail::SalientTask task{w,
                                 m,
                                 group_count(w),
                                 group_width(w),
                                 rows.values,
                                 p.int8 ? rows.q.get() : nullptr,
                                 p.int8 ? rows.scale.get() : nullptr,
                                 p.int8 ? rows.total.get() : nullptr,
                                 sums,
                                 begin};
  const bool spreads = w.value_scale && w.code_bits == 4 && kernel.tiles != detail::salient_tiles_generic;
  spreads ? multiply_spread(kernel, task, begin, end) : kernel.tiles(task, begin, end);
  const Addend addend{sums, m, begin};
  if (p.int8) {
    auto signs = sign_product<BinaryInt8MatmulParams>(p, m, addend, out);
    signs.q = rows.q, signs.row_scale = rows.scale;
    signs.out_dtype = p.dtype;
    detail::binary_int8_matmul_tiles(signs, begin, end);
  } else {
    auto signs = sign_product<BinaryWeightMatmulParams>(p, m, addend, out);
    signs.x = x, signs.dtype = p.dtype;
    detail::binary_weight_matmul_tiles(signs, begin, end);
  }
}

double salient_weights(const SalientWeight& w) {
  const double entries = static_cast<double>(w.entries);
  if (w.encoding == SalientEncoding::list) return entries * kTileRows;
  return w.encoding == SalientEncoding::columns ? entries * static_cast<double>(w.n) : entries;
}

}  // namespace

void detail::salient_tiles_generic(const SalientTask& task, int64_t begin, int64_t end) {
  const SalientWeight& w = task.weight;
  std::vector<float> totals(w.mu ? task.m * task.groups : 0);
  for (size_t i = 0; i < totals.size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / task.groups, group = static_cast<int64_t>(i) % task.groups;
    const int64_t last = std::min(w.k, (group + 1) * task.group_width);
    for (int64_t c = group * task.group_width; c < last; ++c) totals[i] += task.x[row * w.k + c];
  }
  std::vector<int64_t> columns;
  std::vector<float> differences;
  for (int64_t output = begin * kTileRows; output < std::min(w.n, end * kTileRows); ++output) {
    columns.clear();
    differences.clear();
    walk_row(w, output, [&](int64_t column, float value) {
      columns.push_back(column);
      differences.push_back(value - binary_value(w, output, column / task.group_width, -1.0f));
    });
    for (int64_t row = 0; row < task.m; ++row) {
      double exact = 0.0;
      for (size_t i = 0; i < columns.size(); ++i) exact += double{task.x[row * w.k + columns[i]]} * differences[i];
      float sum = static_cast<float>(exact);
      for (int64_t group = 0; w.mu && group < task.groups; ++group) {
        sum += w.mu[output * task.groups + group] * totals[row * task.groups + group];
      }
      task.at(row, output / kTileRows)[output % kTileRows] = task.row_scale ? task.row_scale[row] * sum : sum;
    }
  }
}

Status salient_check(const SalientWeight& w, ParallelFor parallel_for) {
  const Status outline = check_outline(w);
  if (outline != Status::ok) return outline;
  std::atomic<bool> consistent = true;
  const double nanoseconds = static_cast<double>(word_count(w.k)) + salient_weights(w) / static_cast<double>(w.n + 1);
  split(parallel_for, w.n, nanoseconds, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!row_is_consistent(w, row)) consistent = false;
    }
  });
  return consistent ? Status::ok : Status::corrupt;
}

Status salient_matmul(const SalientMatmulParams& p) {
  if (p.m < 0) return Status::bad_size;
  const SalientWeight& w = p.weight;
  const Status status = p.m == 0 ? salient_check(w, p.parallel_for) : check_outline(w);
  if (status != Status::ok || p.m == 0 || w.n == 0) return status;
  const Kernel kernel = choose_kernel(p);
  const double entries = salient_weights(w) / static_cast<double>(w.n) + 2.0, columns = static_cast<double>(w.k);
  const double cost = (entries * kernel.nanoseconds + columns * (p.int8 ? 0.003 : 0.01)) * kTileRows;
  split_blocks(p.parallel_for, p.m, w.n, cost, [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t i = 0, here; i < rows; i += here) {
      here = rows_together(rows - i);
      multiply_part(p, kernel, row + i, here, begin, end);
    }
  });
  return Status::ok;
}

Status salient_dequantize(const SalientWeight& w, float* dense, ParallelFor parallel_for) {
  const Status status = salient_check(w, parallel_for);
  if (status != Status::ok) return status;
  const int64_t words = word_count(w.k), width = group_width(w);
  split(parallel_for, w.n, static_cast<double>(w.k), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* sign = w.sign + (row / kTileRows) * words * kTileRows + row % kTileRows;
      for (int64_t c = 0; c < w.k; ++c) {
        const bool plus = (static_cast<uint32_t>(sign[(c / 32) * kTileRows]) >> (c % 32)) & 1u;
        dense[row * w.k + c] = binary_value(w, row, c / width, plus ? 1.0f : -1.0f);
      }
      walk_row(w, row, [&](int64_t column, float value) { dense[row * w.k + column] = value; });
    }
  });
  return Status::ok;
}

}  // namespace bitmill

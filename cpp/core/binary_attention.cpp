// SPDX-License-Identifier: Apache-2.0
// The obvious form of binary attention, composed of packing and binary products (so every instruction set has it), what
// is prepared once a call besides packed operands, and the choice of the instruction set.
#include "binary_attention.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "binary_attention_task.h"
#include "binary_matmul.h"
#include "bit_output.h"
#include "cpu.h"

namespace bitmill {
namespace detail {
namespace {

// keep [count, rows, map_words], and whether the mask is a bias too.
template <class T>
bool read_mask(const BinaryAttentionParams& p, const T* data, uint32_t* keep) {
  const int64_t words = word_count(p.m);
  bool biased = false;
  for (int64_t matrix = 0; matrix < p.mask.count; ++matrix) {
    for (int64_t row = 0; row < p.mask.rows; ++row, keep += words) {
      const T* x = data + p.mask.values.offset[matrix] + row * p.mask.values.row_stride;
      for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        for (int64_t j = 32 * w; j < 32 * (w + 1) && j < p.m; ++j) {
          const T value = x[j * p.mask.values.column_stride];
          if constexpr (sizeof(T) == 1) {
            word |= static_cast<uint32_t>(value != 0) << (j % 32);
          } else {
            const bool attend = !(to_float(value) <= kDropped);
            word |= static_cast<uint32_t>(attend) << (j % 32);
            biased |= attend && to_float(value) != 0.0f;
          }
        }
        keep[w] = word;
      }
    }
  }
  return biased;
}

bool read_mask(const BinaryAttentionParams& p, uint32_t* keep) {
  if (p.mask.count == 0) {
    const int64_t sequences = p.bits.heads ? p.batch / p.bits.heads : 1, words = word_count(p.m);
    for (int64_t i = 0; i < sequences; ++i, keep += words) {
      const int64_t m = p.bits.heads ? p.bits.k_first[i + 1] - p.bits.k_first[i] : p.m;
      for (int64_t w = 0; w < words; ++w) {
        const int64_t left = std::clamp<int64_t>(m - 32 * w, 0, 32);
        keep[w] = left == 32 ? ~0u : (1u << left) - 1;
      }
    }
    return false;
  }
  if (p.mask.boolean) return read_mask(p, static_cast<const uint8_t*>(p.mask.values.data), keep);
  return with_dtype(p.mask.dtype, p.mask.values.data, [&](const auto* data) { return read_mask(p, data, keep); });
}

void find_lowest(const BinaryAttentionParams& p, int32_t* lowest) {
  const int32_t d = static_cast<int32_t>(p.d);
  int32_t dot = -d;
  for (int32_t top = -d; top <= d; ++top) {
    const float limit = attention_score(p, top) - p.gap;
    const auto active = [&] {
      const float score = attention_score(p, dot);
      return score >= limit && score > -std::numeric_limits<float>::infinity();
    };
    while (dot <= top && !active()) ++dot;
    lowest[top + d] = dot;
  }
}

}  // namespace

void attention_rows_generic(const AttentionTask& t, int64_t batch, int64_t first, int64_t last) {
  const BinaryAttentionParams& p = t.p;
  const int64_t rows = last - first;
  std::vector<int32_t> sign(rows * t.words), nonzero(rows * t.words), dot(rows * p.m), context(rows * p.e);
  std::vector<int32_t> map(rows * t.map_words);
  const bool zeros = pack_queries(t, batch, first, last, false, sign.data(), nonzero.data());
  BinaryMatmulParams scores;
  scores.a = sign.data();
  scores.a_nonzero = zeros ? nonzero.data() : nullptr;
  scores.operand = zeros ? Operand::ternary : Operand::sign;
  const int64_t keys = batch * key_tiles(p.m) * t.words * kTileRows;
  scores.weight = t.k_sign + keys;
  scores.weight_nonzero = t.k_zeros[batch] ? t.k_nonzero + keys : nullptr;
  scores.m = rows;
  scores.n = p.m;
  scores.k = p.d;
  scores.dot = dot.data();
  binary_matmul(scores);
  ValueAddend value_addend(p, batch);
  std::vector<float> addend(rows);
  for (int64_t i = 0; i < rows; ++i) {
    uint32_t* bits = reinterpret_cast<uint32_t*>(map.data() + i * t.map_words);
    decide(t, batch, first + i, dot.data() + i * p.m, bits);
    addend[i] = value_addend.of(bits);
  }
  BinaryMatmulParams product;
  product.a = map.data();
  product.operand = Operand::bool_;
  const int64_t values = batch * tile_count(p.e) * t.map_words * kTileRows;
  product.weight = t.v_sign + values;
  product.weight_nonzero = t.v_zeros[batch] ? t.v_nonzero + values : nullptr;
  product.m = rows;
  product.n = p.e;
  product.k = p.m;
  product.dot = context.data();
  binary_matmul(product);
  if (p.bits.heads) {
    const int64_t tiles = p.e / kTileRows, columns = p.bits.heads * p.e;
    for (int64_t i = 0; i < rows * tiles; ++i) {
      const int64_t row = p.bits.q_first[t.sequence(batch)] + first + i / tiles, tile = i % tiles;
      const int32_t* whole = context.data() + i * kTileRows;
      store_bits(p.bits.out, columns, row, batch % p.bits.heads * tiles + tile, whole, kTileRows, inside_range);
    }
    return;
  }
  with_dtype(p.dtype, p.out, [&](auto* out) {
    for (int64_t i = 0; i < rows; ++i) {
      auto* to = out + p.out_offset[batch] + (first + i) * p.out_row_stride;
      for (int64_t c = 0; c < p.e; ++c) store(p.step * static_cast<float>(context[i * p.e + c]) + addend[i], to + c);
    }
  });
}

}  // namespace detail

Status binary_attention(const BinaryAttentionParams& p) {
  for (const int64_t size : {p.batch, p.n, p.m, p.d, p.e}) {
    if (size < 0) return Status::bad_size;
  }
  if (p.d > kMaxColumns || p.m > kMaxColumns) return Status::bad_size;
  if (p.d == 0 || !(p.scale > 0.0f) || !(p.scale <= std::numeric_limits<float>::max())) return Status::bad_argument;
  if (p.bits.heads < 0 || (p.bits.heads > 0 && (p.d % 32 || p.e % 32 || p.batch % p.bits.heads))) {
    return Status::bad_argument;
  }
  if (p.batch == 0 || p.n == 0 || p.e == 0) return Status::ok;
  if (p.mask.count > 0 && p.mask.rows != 1 && p.mask.rows != p.n) return Status::bad_argument;

  using detail::AttentionTask;
  const int64_t words = word_count(p.d), map_words = word_count(p.m);
  const int64_t keys = p.batch * detail::key_tiles(p.m) * words * kTileRows;
  const int64_t values = p.batch * tile_count(p.e) * map_words * kTileRows;
  const int64_t sequences = p.bits.heads ? p.batch / p.bits.heads : 1;
  const int64_t mask_rows = p.mask.count ? p.mask.count * p.mask.rows : sequences;
  const bool k_zeros = p.bits.heads ? p.bits.k.nonzero != nullptr : p.zeros;
  const bool v_zeros = p.bits.heads ? p.bits.v.nonzero != nullptr : p.zeros;
  const bool softmax_aware = p.rule == AttentionRule::softmax_aware, elastic = p.rule == AttentionRule::elastic;
  const auto scratch = []<class T>(int64_t count, T) {
    return std::unique_ptr<T[]>(count ? new T[static_cast<size_t>(count)] : nullptr);
  };
  const auto k_sign = scratch(keys, int32_t{}), k_nonzero = scratch(k_zeros ? keys : 0, int32_t{});
  const auto v_sign = scratch(values, int32_t{}), v_nonzero = scratch(v_zeros ? values : 0, int32_t{});
  const auto zeros = scratch(2 * p.batch, uint8_t{});
  const auto keep = scratch(mask_rows * map_words, uint32_t{});
  const auto lowest = scratch(softmax_aware ? 2 * p.d + 1 : 0, int32_t{});
  const auto weight = scratch(elastic ? 4 * p.d + 3 : 0, int64_t{});
  const auto weight_of_pair = scratch(elastic ? 2 * p.d + 2 : 0, int64_t{});
  AttentionTask task{p,
                     words,
                     map_words,
                     k_sign.get(),
                     k_nonzero.get(),
                     v_sign.get(),
                     v_nonzero.get(),
                     zeros.get(),
                     zeros.get() + p.batch,
                     keep.get(),
                     false,
                     lowest.get(),
                     weight.get(),
                     weight_of_pair.get()};
  task.biased = detail::read_mask(p, keep.get());
  if (softmax_aware) detail::find_lowest(p, lowest.get());
  if (elastic) {
    for (int64_t i = 0; i <= 2 * p.d; ++i) weight[i] = detail::elastic_weight(-p.slope * static_cast<double>(i));
    std::fill_n(weight.get() + 2 * p.d + 1, 2 * p.d + 2, int64_t{0});
    for (int64_t i = 0; i <= 2 * p.d + 1; ++i) weight_of_pair[i] = weight[2 * i];
  }

  const auto pack = [&](int64_t batch) {
    detail::pack_keys(task, batch);
    detail::pack_values(task, batch);
  };
  auto* rows = detail::attention_rows_generic;
  double nanoseconds = 0.02;  // of a product of two bits
#ifdef BITMILL_EIGHT_LANES
  if (eight_lanes()) rows = detail::attention_rows_avx2, nanoseconds = 0.003;
#endif
#ifdef BITMILL_AVX512
  if (selected() == InstructionSet::avx512) rows = detail::attention_rows_avx512, nanoseconds = 0.002;
#endif
  const auto attend = [&](int64_t batch, int64_t first) {
    const int64_t last = std::min(task.query_rows(batch), first + detail::kRowsTogether);
    if (first < last) rows(task, batch, first, last);
  };
  const double packing = static_cast<double>(p.m * (p.d + p.e)) * 0.1;
  const double block = static_cast<double>(detail::kRowsTogether * p.m * (p.d + p.e)) * nanoseconds;
  const int64_t blocks = ceil_div(p.n, detail::kRowsTogether);
  const double whole = packing + block * static_cast<double>(blocks);
  if (whole <= kSmallestPart) {  // no smaller part is worth a thread
    split(p.parallel_for, p.batch, whole, [&](int64_t begin, int64_t end) {
      for (int64_t batch = begin; batch < end; ++batch) {
        pack(batch);
        for (int64_t i = 0; i < blocks; ++i) attend(batch, i * detail::kRowsTogether);
      }
    });
    return Status::ok;
  }
  split(p.parallel_for, p.batch, packing, [&](int64_t begin, int64_t end) {
    for (int64_t batch = begin; batch < end; ++batch) pack(batch);
  });
  split(p.parallel_for, p.batch * blocks, block, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attend(i / blocks, i % blocks * detail::kRowsTogether);
  });
  return Status::ok;
}

}  // namespace bitmill

// SPDX-License-Identifier: Apache-2.0
// The obvious form of the zoned product, the order of its columns, and the choice of the instruction set.
#include "zoned.h"

#include <algorithm>

#include "cpu.h"
#include "layout.h"
#include "panel_matmul.h"

namespace bitmill {
namespace {

using detail::ZonedBlock;
using detail::ZonedPlan;

bool bit_of(const int32_t* tiles, int64_t words, int64_t row, int64_t column) {
  const int64_t word = ((row / kTileRows) * words + column / 32) * kTileRows + row % kTileRows;
  return (static_cast<uint32_t>(tiles[word]) >> (column % 32)) & 1u;
}

float scale_at(const ZonedWeight& w, const void* scale, int64_t i) {
  if (w.scale_dtype == Dtype::f32) return static_cast<const float*>(scale)[i];
  return to_float(static_cast<const Float16*>(scale)[i]);
}

// The weight of an output at a stored place of a block.
float value_at(const ZonedWeight& w, const ZonedPlan& plan, int64_t block, int64_t row, int64_t place) {
  const ZonedBlock& b = plan.blocks[block];
  const int64_t words = word_count(w.k), count = static_cast<int64_t>(plan.blocks.size());
  const bool salient = place - b.first < b.salient, first = bit_of(w.sign, words, row, place);
  const bool second = bit_of(w.zone, words, row, place);
  const int64_t zone_scales = w.centred ? 2 : 1;
  int64_t at = second && !salient ? zone_scales : 0;
  if (salient) {
    at = 2 * zone_scales;
    if (w.split) {
      const int64_t column = b.split_first + place - b.first;
      const bool sparse = bit_of(w.salient_zone, w.salient_zone_words, row, column);
      at += sparse ? zone_scales + 1 : 0;
    }
  }
  const auto scale = [&](int64_t i) {
    const int64_t tile_block = (row / kTileRows) * count + block;
    return scale_at(w, w.scale, (tile_block * w.scales() + at + i) * kTileRows + row % kTileRows);
  };
  const float alpha = scale(zone_scales - 1);
  float value = first ? alpha : -alpha;
  if (w.centred) value = scale(0) + value;
  if (salient) value += second ? scale(zone_scales) : -scale(zone_scales);
  return w.column_scale ? value * scale_at(w, w.column_scale, plan.order[place]) : value;
}

Status check(const ZonedWeight& w, const ZonedPlan& plan) {
  return w.split && w.salient_zone_words != word_count(plan.salient_zone_columns) ? Status::corrupt : Status::ok;
}

Status check_sizes(const ZonedWeight& w) {
  if (w.n < 0 || w.k < 0 || w.k > kMaxColumns) return Status::bad_size;
  return w.block > 0 && w.block % 32 == 0 && w.scale_dtype != Dtype::bf16 ? Status::ok : Status::bad_argument;
}

template <class T>
void multiply_generic(const ZonedMatmulParams& p, const ZonedPlan& plan) {
  const ZonedWeight& w = p.weight;
  std::vector<T> ordered(p.m * w.k);
  const T* x = static_cast<const T*>(p.x);
  for (int64_t row = 0; row < p.m; ++row) {
    for (int64_t i = 0; i < w.k; ++i) ordered[row * w.k + i] = x[row * w.k + plan.order[i]];
  }
  const auto decode = [&](int64_t tile, int64_t begin, int64_t end, float* panel) {
    for (int64_t place = begin; place < end; ++place) {
      for (int64_t lane = 0; lane < kTileRows; ++lane) {
        panel[(place - begin) * kTileRows + lane] = value_at(w, plan, place / w.block, tile * kTileRows + lane, place);
      }
    }
  };
  const auto finish = [](int64_t, int64_t, int64_t, int64_t, float sum, float& value) { value += sum; };
  const auto done = [&](int64_t, int64_t tile, int64_t lane, float value) {
    return p.bias ? value + p.bias[tile * kTileRows + lane] : value;
  };
  detail::panel_matmul({p.m, w.n, w.k, 0}, ordered.data(), static_cast<T*>(p.out), p.parallel_for, decode, finish,
                       done);
}

struct Kernel {
  void (*tiles)(const ZonedMatmulParams&, const ZonedPlan&, int64_t, int64_t);  // null: the obvious form
  double nanoseconds_per_column;                                                // of one row and one output
};

Kernel choose_kernel() {
  switch (selected()) {
#ifdef BITMILL_EIGHT_LANES
    case InstructionSet::neon:
    case InstructionSet::avx2:
      return {detail::zoned_tiles_avx2, 0.05};
#endif
#ifdef BITMILL_AVX512
    case InstructionSet::avx512:
      return {detail::zoned_tiles_avx512, 0.03};
#endif
    default:
      return {nullptr, 0.0};
  }
}

}  // namespace

detail::ZonedPlan detail::zoned_plan(const ZonedWeight& w) {
  ZonedPlan plan;
  const auto is_salient = [&](int64_t column) {
    return (static_cast<uint32_t>(w.salient[column / 32]) >> (column % 32)) & 1u;
  };
  plan.order.reserve(w.k);
  for (int64_t first = 0; first < w.k; first += w.block) {
    ZonedBlock b{first, std::min(w.block, w.k - first), 0, plan.salient_zone_columns};
    for (const bool salient : {true, false}) {
      for (int64_t column = first; column < first + b.columns; ++column) {
        if (is_salient(column) == salient) plan.order.push_back(static_cast<int32_t>(column));
      }
      if (salient) b.salient = static_cast<int64_t>(plan.order.size()) - first;
    }
    plan.salient_zone_columns += 8 * b.salient_octets();
    const auto read = [&](int64_t begin, int64_t octets, int64_t from, int64_t to) {
      for (int64_t i = 8 * begin; i < 8 * (begin + octets); ++i) {
        const bool here = i >= from && i < to;
        plan.slots.push_back(here ? plan.order[first + i] : static_cast<int32_t>(w.k));
      }
    };
    read(0, b.salient_octets(), 0, b.salient);
    read(b.others_begin(), b.other_octets(), b.salient, b.columns);
    plan.blocks.push_back(b);
  }
  return plan;
}

Status zoned_matmul(const ZonedMatmulParams& p) {
  const Status sizes = p.m < 0 ? Status::bad_size : check_sizes(p.weight);
  if (sizes != Status::ok) return sizes;
  const ZonedWeight& w = p.weight;
  const ZonedPlan plan = detail::zoned_plan(w);
  const Status status = check(w, plan);
  if (status != Status::ok || p.m == 0 || w.n == 0) return status;
  if (const Kernel kernel = choose_kernel(); kernel.tiles && w.k > 0) {
    const double cost = static_cast<double>(w.k) * kernel.nanoseconds_per_column;
    split_product(p.parallel_for, p.m, w.n, cost, [&](int64_t row, int64_t rows, int64_t begin, int64_t end) {
      ZonedMatmulParams part = p;
      part.x = static_cast<const char*>(p.x) + row * w.k * bytes_of(p.dtype);
      part.out = static_cast<char*>(p.out) + row * w.n * bytes_of(p.dtype);
      part.m = rows - row;
      kernel.tiles(part, plan, begin, end);
    });
    return Status::ok;
  }
  with_dtype(p.dtype, p.x, [&]<class T>(const T*) { multiply_generic<T>(p, plan); });
  return Status::ok;
}

Status zoned_dequantize(const ZonedWeight& w, float* dense, ParallelFor parallel_for) {
  const Status sizes = check_sizes(w);
  if (sizes != Status::ok) return sizes;
  const ZonedPlan plan = detail::zoned_plan(w);
  const Status status = check(w, plan);
  if (status != Status::ok) return status;
  split(parallel_for, w.n, static_cast<double>(w.k) * 5.0, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t place = 0; place < w.k; ++place) {
        dense[row * w.k + plan.order[place]] = value_at(w, plan, place / w.block, row, place);
      }
    }
  });
  return Status::ok;
}

}  // namespace bitmill

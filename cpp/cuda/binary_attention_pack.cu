// SPDX-License-Identifier: Apache-2.0
// Operands of binary attention as bits, a warp for each word of 32 of them: queries as rows, keys with neighbouring
// keys beside each other, values with neighbouring channels beside each other, and the keys that a mask lets through.
#include <vector>

#include "binary_attention.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace bitmill::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarps = kThreads / kWarp;

bool find_places(const std::vector<int64_t>& offset, Places& places) {
  const auto count = static_cast<int64_t>(offset.size());
  places = {};
  if (count == 0) return true;
  if (offset[0] != 0) return false;
  places.inner_step = count > 1 ? offset[1] : 0;
  while (places.inner < count && offset[places.inner] == places.inner * places.inner_step) ++places.inner;
  places.outer_step = places.inner < count ? offset[places.inner] : 0;
  for (int64_t i = 0; i < count; ++i) {
    if (offset[i] != places.at(i)) return false;
  }
  return true;
}

bool find_places(const int64_t* offset, int64_t count, Places& places) {
  return find_places(std::vector<int64_t>(offset, offset + count), places);
}

struct Bit {
  bool sign, present;
};

// Values of matrices as bits.
template <class T>
struct FloatSource {
  const T* x;
  Places places;
  int64_t row_stride, column_stride;
  bool zeros;
  __device__ Bit at(int64_t batch, int64_t row, int64_t column) const {
    const float value = widen(x[places.at(batch) + row * row_stride + column * column_stride]);
    return {zeros ? value > 0 : value >= 0, !zeros || value > 0 || value < 0};
  }
};
// Heads side by side in packed rows, `rows` a sequence.
struct BitSource {
  const int32_t *sign, *nonzero;
  int64_t stride, heads, rows, words;
  __device__ Bit at(int64_t batch, int64_t row, int64_t column) const {
    const int64_t word = (batch / heads * rows + row) * stride + batch % heads * words + column / 32;
    const auto bit = static_cast<unsigned>(column % 32);
    return {(sign[word] >> bit & 1) != 0, !nonzero || (nonzero[word] >> bit & 1) != 0};
  }
};

// Rows [batch, rows, columns] to words [batch, rows, words], or, by_key, [batch, words, padded rows] with 0 past rows.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    attention_rows_kernel(Source source, int64_t batches, int64_t rows, int64_t padded, int64_t columns, bool by_key,
                          uint32_t* sign, uint32_t* nonzero) {
  const int64_t words = word_count(columns), id = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (id >= batches * padded * words) return;  // a whole warp
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t batch = id / (padded * words), row = id / words % padded, word = id % words;
  const int64_t column = 32 * word + lane;
  const Bit bit = row < rows && column < columns ? source.at(batch, row, column) : Bit{false, false};
  const uint32_t signs = __ballot_sync(kAllLanes, bit.sign && bit.present);
  const uint32_t present = __ballot_sync(kAllLanes, bit.present);
  if (lane != 0) return;
  const int64_t at = by_key ? (batch * words + word) * padded + row : id;
  sign[at] = signs;
  if (nonzero) nonzero[at] = present;
}

// Values [batch, m, e] to words of 32 keys [batch, map words, channels]: what is +1, and what is -1.
template <class Source>
__global__ void __launch_bounds__(kThreads)
    attention_values_kernel(Source source, AttentionView view, uint32_t* plus, uint32_t* minus) {
  const int64_t channels = view.channels(), id = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (id >= view.p.batch * view.map_words * channels) return;
  const int64_t batch = id / (view.map_words * channels), word = id / channels % view.map_words, c = id % channels;
  uint32_t above = 0, below = 0;
  for (int i = 0; i < 32 && 32 * word + i < view.p.m && c < view.p.e; ++i) {
    const Bit bit = source.at(batch, 32 * word + i, c);
    above |= static_cast<uint32_t>(bit.sign && bit.present) << i;
    below |= static_cast<uint32_t>(!bit.sign && bit.present) << i;
  }
  plus[id] = above;
  if (minus) minus[id] = below;
}

template <class T>
__global__ void __launch_bounds__(kThreads) attention_mask_kernel(const T* mask, AttentionMask shape, Places places,
                                                                  int64_t m, uint32_t* keep, int32_t* biased) {
  const int64_t words = word_count(m), id = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (id >= shape.count * shape.rows * words) return;  // a whole warp
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t matrix = id / (shape.rows * words), row = id / words % shape.rows, key = 32 * (id % words) + lane;
  bool attends = false, adds = false;
  if (key < m) {
    const T value = mask[places.at(matrix) + row * shape.values.row_stride + key * shape.values.column_stride];
    if constexpr (sizeof(T) == 1) {
      attends = value != 0;
    } else {
      attends = !(widen(value) <= kDropped);
      adds = attends && widen(value) != 0.0f;
    }
  }
  const uint32_t word = __ballot_sync(kAllLanes, attends), any = __ballot_sync(kAllLanes, adds);
  if (lane != 0) return;
  keep[id] = word;
  if (any) *biased = 1;
}

__device__ float floored(float value) { return value < kAttentionStepFloor ? kAttentionStepFloor : value; }

__global__ void attention_numbers_kernel(AttentionSteps steps, AttentionNumbers* numbers) {
  if (threadIdx.x > 0) return;
  const double product = static_cast<double>(floored(*steps.q)) * static_cast<double>(floored(*steps.k));
  const float a = floored(*steps.a);
  numbers->slope = steps.divide ? product / steps.scaling : product * steps.scaling;
  numbers->threshold = static_cast<double>(a) / 2;
  numbers->step = steps.v ? a * floored(*steps.v) : 1.0f;
  numbers->addend_step = a;
}

template <class Source>
Status pack_rows(const Source& source, int64_t batches, int64_t rows, int64_t padded, int64_t columns, bool by_key,
                 uint32_t* sign, uint32_t* nonzero, Stream stream) {
  const int64_t blocks = ceil_div(batches * padded * word_count(columns), kWarps);
  return blocks == 0 ? Status::ok
                     : launch(stream, attention_rows_kernel<Source>, blocks, kThreads, 0, source, batches, rows, padded,
                              columns, by_key, sign, nonzero);
}

template <class Source>
Status pack_operands(const AttentionView& view, const Source& q, const Source& k, const Source& v, Stream stream) {
  const BinaryAttentionParams& p = view.p;
  const auto to = [](const uint32_t* plane) { return const_cast<uint32_t*>(plane); };
  Status status = pack_rows(q, p.batch, p.n, p.n, p.d, false, to(view.q_sign), to(view.q_nonzero), stream);
  if (status != Status::ok) return status;
  status = pack_rows(k, p.batch, p.m, view.keys(), p.d, true, to(view.k_sign), to(view.k_nonzero), stream);
  const int64_t blocks = ceil_div(p.batch * view.map_words * view.channels(), kThreads);
  if (status != Status::ok || blocks == 0) return status;
  return launch(stream, attention_values_kernel<Source>, blocks, kThreads, 0, v, view, to(view.v_plus),
                to(view.v_minus));
}

template <class T>
Status pack_mask(const AttentionView& view, const T* mask, const Places& places, Stream stream) {
  const int64_t blocks = ceil_div(view.p.mask.count * view.p.mask.rows * view.map_words, kWarps);
  return blocks == 0 ? Status::ok
                     : launch(stream, attention_mask_kernel<T>, blocks, kThreads, 0, mask, view.p.mask, places,
                              view.p.m, const_cast<uint32_t*>(view.keep), const_cast<int32_t*>(view.biased));
}

// Takes what a view needs of the scratch memory, or counts it where there is none yet.
int64_t place_scratch(const BinaryAttentionParams& p, int32_t* scratch, AttentionView& view) {
  int64_t taken = 0;
  const auto take = [&](int64_t count) {
    auto* from = scratch ? reinterpret_cast<uint32_t*>(scratch) + taken : nullptr;
    taken += count;
    return from;
  };
  view.numbers = reinterpret_cast<const AttentionNumbers*>(take(sizeof(AttentionNumbers) / 4));  // first: aligned
  view.p = p;
  view.words = word_count(p.d);
  view.map_words = word_count(p.m);
  view.zeros = p.bits.heads ? p.bits.q.nonzero || p.bits.k.nonzero || p.bits.v.nonzero : p.zeros;
  const int64_t q = p.batch * p.n * view.words, k = p.batch * view.words * view.keys();
  const int64_t v = p.batch * view.map_words * view.channels();
  view.q_sign = take(q);
  view.k_sign = take(k);
  view.v_plus = take(v);
  view.q_nonzero = view.zeros ? take(q) : nullptr;
  view.k_nonzero = view.zeros ? take(k) : nullptr;
  view.v_minus = view.zeros ? take(v) : nullptr;
  view.keep = p.mask.count > 0 ? take(p.mask.count * p.mask.rows * view.map_words) : nullptr;
  view.biased = reinterpret_cast<int32_t*>(p.mask.count > 0 ? take(1) : nullptr);
  return taken;
}

}  // namespace

int64_t binary_attention_scratch(const BinaryAttentionParams& p) {
  AttentionView view{};
  return place_scratch(p, nullptr, view);
}

Status pack_attention(const BinaryAttentionParams& p, const AttentionSteps& steps, int32_t* scratch, Stream stream,
                      AttentionView& view) {
  place_scratch(p, scratch, view);
  if (steps.q) {
    auto* const numbers = const_cast<AttentionNumbers*>(view.numbers);
    const Status status = launch(stream, attention_numbers_kernel, 1, kWarp, 0, steps, numbers);
    if (status != Status::ok) return status;
  } else {
    view.numbers = nullptr;
  }
  if (p.mask.count > 0) {
    Places places;
    if (!find_places(p.mask.values.offset, p.mask.count, places) || !find_places(p.mask.of, p.batch, view.mask)) {
      return Status::bad_argument;
    }
    Status status = clear_number(const_cast<int32_t*>(view.biased), stream);
    if (status != Status::ok) return status;
    status = p.mask.boolean ? pack_mask(view, static_cast<const uint8_t*>(p.mask.values.data), places, stream)
                            : with_dtype(p.mask.dtype, p.mask.values.data,
                                         [&](const auto* mask) { return pack_mask(view, mask, places, stream); });
    if (status != Status::ok) return status;
    // A bias lies where its matrix does.
    std::vector<int64_t> bias;
    for (int64_t i = 0; i < p.batch; ++i) bias.push_back(p.mask.values.offset[p.mask.of[i]]);
    if (!find_places(bias, view.bias)) return Status::bad_argument;
  }
  if (p.value_addend.data && !find_places(p.value_addend.offset, p.batch, view.addend)) return Status::bad_argument;
  if (p.bits.heads) {
    const auto source = [&](const AttentionRows& rows, int64_t count, int64_t columns) {
      return BitSource{rows.sign, rows.nonzero, rows.stride, p.bits.heads, count, columns / 32};
    };
    return pack_operands(view, source(p.bits.q, p.n, p.d), source(p.bits.k, p.m, p.d), source(p.bits.v, p.m, p.e),
                         stream);
  }
  Places places[3];
  const Matrices* const matrices[3] = {&p.q, &p.k, &p.v};
  for (int i = 0; i < 3; ++i) {
    if (!find_places(matrices[i]->offset, p.batch, places[i])) return Status::bad_argument;
  }
  if (!find_places(p.out_offset, p.batch, view.out)) return Status::bad_argument;
  return with_dtype(p.dtype, p.q.data, [&]<class T>(const T*) {
    const auto source = [&](int i) {
      const Matrices& x = *matrices[i];
      return FloatSource<T>{static_cast<const T*>(x.data), places[i], x.row_stride, x.column_stride, p.zeros};
    };
    return pack_operands(view, source(0), source(1), source(2), stream);
  });
}

}  // namespace bitmill::cuda

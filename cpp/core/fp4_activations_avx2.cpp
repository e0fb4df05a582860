// SPDX-License-Identifier: Apache-2.0
// Activations as 4-bit floats with AVX2, 16 at a time: an index is the number of steps that a magnitude has reached, a
// table has its integer, and the float gives it its sign. Bit-equal to the generic form.
#include <cstring>

#include "avx2.h"
#include "fp4_activations.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

constexpr int kLanes = 16;  // two vectors

struct Caster {
  __m256i below[7], integers;

  explicit Caster(Fp4Format format) {
    const Fp4Steps steps = fp4_steps(format);
    for (int i = 0; i < 7; ++i) below[i] = _mm256_set1_epi32(static_cast<int>(steps.first[i] - 1));
    Fp4Integers all;
    fp4_integers(fp4_table(format).value, all);
    integers = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(all.value)));
  }

  // Of any floats but NaN.
  __m256i operator()(__m256 value) const {
    const __m256i magnitude = magnitudes(value);
    __m256i index = _mm256_setzero_si256();
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) index = _mm256_sub_epi32(index, _mm256_cmpgt_epi32(magnitude, below[i]));
    return _mm256_sign_epi32(_mm256_permutevar8x32_epi32(integers, index), _mm256_castps_si256(value));
  }
};

void store16(int8_t* q, __m256i a, __m256i b) {
  const __m256i shorts = _mm256_packs_epi32(a, b);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm_shuffle_epi32(bytes, 0xD8));
}

template <class T>
struct Columns {  // `count` of them; a part of a whole is filled with zeros
  T value[2 * kLanes] = {};

  Columns(const T* x, int64_t count) {
    if (count > 0) std::memcpy(value, x, static_cast<size_t>(count) * sizeof(T));
  }
};

// Columns as 16 integers; whether one of them is NaN.
template <class T>
bool fpq_step(const Caster& cast, const T* x, const float* step, const int32_t* left, int8_t* q) {
  __m256 nans = _mm256_setzero_ps();
  const auto integers = [&](int i) {
    const __m256 value = _mm256_div_ps(load8(x + i), _mm256_loadu_ps(step + i));
    const __m256 nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
    nans = _mm256_or_ps(nans, nan);
    const __m256i shifts = load_bits(left + i);
    return _mm256_andnot_si256(_mm256_castps_si256(nan), _mm256_sllv_epi32(cast(value), shifts));
  };
  const __m256i a = integers(0), b = integers(8);
  store16(q, a, b);
  return _mm256_movemask_ps(nans) != 0;
}

template <class T>
float fpq_row(const Caster& cast, const FpqColumns& columns, const T* x, int64_t k, int8_t* q) {
  const int64_t whole = k / kLanes * kLanes;
  bool nan = false;
  for (int64_t j = 0; j < whole; j += kLanes) {
    nan |= fpq_step(cast, x + j, columns.step + j, columns.left + j, q + j);
  }
  if (const int64_t rest = k - whole; rest > 0) {
    const Columns<T> last(x + whole, rest);
    float step[kLanes];
    int32_t left[kLanes] = {};
    int8_t bytes[kLanes];
    for (int i = 0; i < kLanes; ++i) step[i] = i < rest ? columns.step[whole + i] : 1.0f;
    std::memcpy(left, columns.left + whole, static_cast<size_t>(rest) * sizeof(int32_t));
    nan |= fpq_step(cast, last.value, step, left, bytes);
    std::memcpy(q + whole, bytes, static_cast<size_t>(rest));
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : columns.row_scale;
}

// The bits of the largest magnitude of `width` columns.
template <int width, class T>
uint32_t block_amax(const T* x, __m256 factor) {
  __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int i = 0; i < width; i += 8) {
    largest = _mm256_max_epu32(largest, magnitudes(_mm256_mul_ps(load8(x + i), factor)));
  }
  return highest(largest);
}

template <int width, class T>
void cast_block(const Caster& cast, const T* x, __m256 factor, float inverse, int8_t* q) {
  const auto integers = [&](int i) {
    return cast(_mm256_mul_ps(_mm256_mul_ps(load8(x + i), factor), _mm256_set1_ps(inverse)));
  };
#pragma GCC unroll 2
  for (int i = 0; i < width; i += kLanes) store16(q + i, integers(i), integers(i + 8));
}

// `width` columns share a scale, which `scale_of` makes of the bits of their largest magnitude. First the magnitudes of
// many blocks, then their scales, then the columns: a block alone would wait for its divisions.
template <int width, class T, class ScaleOf>
void block_row(const Caster& cast, const T* x, int64_t k, BlockScale whole, const ScaleOf& scale_of, int8_t* q,
               float* scale) {
  constexpr int64_t kBlocks = 64;
  const __m256 factor = _mm256_set1_ps(whole.inverse);
  const int64_t blocks = ceil_div(k, width), full = k / width;
  const Columns<T> last(x + full * width, k - full * width);
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    const int64_t count = blocks - first < kBlocks ? blocks - first : kBlocks;
    const auto at = [&](int64_t i) { return first + i < full ? x + (first + i) * width : last.value; };
    uint32_t amax[kBlocks];
    BlockScale found[kBlocks];
    for (int64_t i = 0; i < count; ++i) amax[i] = block_amax<width>(at(i), factor);
    for (int64_t i = 0; i < count; ++i) {
      found[i] = scale_of(amax[i]);
      scale[first + i] = found[i].scale * whole.scale * 0.5f;
    }
    for (int64_t i = 0; i < count; ++i) {
      int8_t part[width];
      int8_t* out = first + i < full ? q + (first + i) * width : part;
      if (found[i].scale == found[i].scale) {
        cast_block<width>(cast, at(i), factor, found[i].inverse, out);
      } else {
        std::memset(out, 0, width);
      }
      if (out == part) std::memcpy(q + full * width, part, static_cast<size_t>(k - full * width));
    }
  }
}

template <class T>
uint32_t row_amax(const T* x, int64_t k) {
  const int64_t whole = k / 8 * 8;
  __m256i largest = magnitudes(load8(Columns<T>(x + whole, k - whole).value));
  for (int64_t j = 0; j < whole; j += 8) largest = _mm256_max_epu32(largest, magnitudes(load8(x + j)));
  return highest(largest);
}

}  // namespace

void fp4_activations_rows_avx2(const Fp4ActivationsParams& p, const FpqColumns& columns, int64_t begin, int64_t end) {
  const Caster cast(p.format);
  const int64_t groups = p.groups();
  with_dtype(p.dtype, p.x, [&](const auto* all) {
    for (int64_t row = begin; row < end; ++row) {
      const auto* x = all + row * p.k;
      int8_t* q = p.q + row * p.k;
      float* scale = p.row_scale + row * groups;
      if (p.kind == Fp4Activations::fpq) {
        *scale = fpq_row(cast, columns, x, p.k, q);
      } else if (p.kind == Fp4Activations::mxfp4) {
        const auto scale_of = [&](uint32_t amax) { return mxfp4_block(amax, p.rule); };
        block_row<kMxBlock>(cast, x, p.k, {1.0f, 1.0f}, scale_of, q, scale);
      } else {
        block_row<kNvBlock>(cast, x, p.k, nvfp4_row(row_amax(x, p.k)), nvfp4_block, q, scale);
      }
    }
  });
}

}  // namespace bitmill::detail

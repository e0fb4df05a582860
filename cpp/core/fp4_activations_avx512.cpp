// SPDX-License-Identifier: Apache-2.0
// Activations as 4-bit floats with AVX-512, 16 at a time: a code is the number of steps that a magnitude has reached,
// and a table has its integer. Bit-equal to the generic form.
#include "avx512.h"
#include "fp4_activations.h"
#include "layout.h"

namespace bitmill::detail {
namespace {

__m512i magnitudes(__m512 value) { return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF)); }

struct Caster {
  __m512i step[7], integers;

  explicit Caster(Fp4Format format) {
    const Fp4Steps steps = fp4_steps(format);
    for (int i = 0; i < 7; ++i) step[i] = _mm512_set1_epi32(static_cast<int>(steps.first[i]));
    Fp4Integers all;
    fp4_integers(fp4_table(format).value, all);
    integers = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(all.value)));
  }

  __m512i operator()(__m512 value) const {
    const __m512i bits = _mm512_castps_si512(value), magnitude = magnitudes(value), one = _mm512_set1_epi32(1);
    __m512i code = _mm512_and_si512(_mm512_srli_epi32(bits, 28), _mm512_set1_epi32(8));
#pragma GCC unroll 7
    for (int i = 0; i < 7; ++i) {
      code = _mm512_mask_add_epi32(code, _mm512_cmpge_epi32_mask(magnitude, step[i]), code, one);
    }
    return _mm512_permutexvar_epi32(code, integers);
  }
};

void store_bytes(int8_t* q, __mmask16 lanes, __m512i values) {
  const __m128i bytes = _mm512_cvtepi32_epi8(values);
  if (lanes == 0xFFFF) return _mm_storeu_si128(reinterpret_cast<__m128i*>(q), bytes);
  _mm_mask_storeu_epi8(q, lanes, bytes);
}

template <class T>
__m512 load_lanes(const T* x, __mmask16 lanes) {
  return lanes == 0xFFFF ? load16(x) : load16(x, lanes);
}

template <class T>
float fpq_row(const Caster& cast, const FpqColumns& columns, const T* x, int64_t k, int8_t* q) {
  __mmask16 nans = 0;
  for (int64_t j = 0; j < k; j += 16) {
    const __mmask16 lanes = first_lanes(k - j);
    const __m512 value = _mm512_maskz_div_ps(lanes, load_lanes(x + j, lanes), load_lanes(columns.step + j, lanes));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    nans |= nan;
    const __m512i left = _mm512_maskz_loadu_epi32(lanes, columns.left + j);
    store_bytes(q + j, lanes, _mm512_maskz_sllv_epi32(static_cast<__mmask16>(~nan), cast(value), left));
  }
  return nans ? std::numeric_limits<float>::quiet_NaN() : columns.row_scale;
}

// `vectors` times 16 columns share a scale, which `scale_of` makes of the bits of their largest magnitude.
template <int vectors, class T, class ScaleOf>
void block_row(const Caster& cast, const T* x, int64_t k, BlockScale whole, const ScaleOf& scale_of, int8_t* q,
               float* scale) {
  const __m512 factor = _mm512_set1_ps(whole.inverse);
  for (int64_t j = 0; j < k; j += 16 * vectors, ++scale) {
    __m512 value[vectors];
    __mmask16 lanes[vectors];
    __m512i largest = _mm512_setzero_si512();
    for (int v = 0; v < vectors; ++v) {
      lanes[v] = first_lanes(k - j - 16 * v);
      value[v] = _mm512_mul_ps(load_lanes(x + j + 16 * v, lanes[v]), factor);
      largest = _mm512_max_epu32(largest, magnitudes(value[v]));
    }
    const BlockScale found = scale_of(_mm512_reduce_max_epu32(largest));
    *scale = found.scale * whole.scale * 0.5f;
    const bool valid = found.scale == found.scale;
    const __m512 inverse = _mm512_set1_ps(found.inverse);
    for (int v = 0; v < vectors; ++v) {
      if (lanes[v] == 0) continue;
      const __m512i integers = valid ? cast(_mm512_mul_ps(value[v], inverse)) : _mm512_setzero_si512();
      store_bytes(q + j + 16 * v, lanes[v], integers);
    }
  }
}

template <class T>
uint32_t row_amax(const T* x, int64_t k) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < k; j += 16) {
    largest = _mm512_max_epu32(largest, magnitudes(load_lanes(x + j, first_lanes(k - j))));
  }
  return _mm512_reduce_max_epu32(largest);
}

}  // namespace

void fp4_activations_rows_avx512(const Fp4ActivationsParams& p, const FpqColumns& columns, int64_t begin, int64_t end) {
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
        block_row<2>(cast, x, p.k, {1.0f, 1.0f}, scale_of, q, scale);
      } else {
        block_row<1>(cast, x, p.k, nvfp4_row(row_amax(x, p.k)), nvfp4_block, q, scale);
      }
    }
  });
}

}  // namespace bitmill::detail

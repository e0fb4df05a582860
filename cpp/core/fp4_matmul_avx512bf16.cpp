// SPDX-License-Identifier: Apache-2.0
// bfloat16 activations times FP4 weights whose 16 values are bfloat16s: vpermw decodes the codes of two columns of 16
// outputs, vdpbf16ps multiplies them with a pair of activations and sums in float32. Products are exact. That
// instruction takes subnormal numbers as 0.
#include "fp4_tiles_avx512.h"

namespace bitmill::detail {
namespace {

struct HalfPath : FloatSums<BFloat16> {
  using Values = __m512i;
  static constexpr int kSteps = 4;  // step j takes columns 8 w + j and 8 w + 4 + j of word w
  __m512i table;                    // twice: vpermw takes 5 bits

  // Rows that are missing count as zeros.
  static int64_t fours(int64_t rows) { return rows % 4 == 1 ? rows - 1 : ceil_div(rows, 4) * 4; }

  static __m512 elements(const BFloat16* x, int64_t k, int64_t first) {
    // 32 columns: words 0 ... 3, and of each columns 0 4 1 5 2 6 3 7.
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                                        16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
    const int64_t left = k - 2 * first;
    const __mmask32 lanes = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    const __m512i values = _mm512_maskz_loadu_epi16(lanes, x + 2 * first);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), values));
  }

  __m512i lookup(__m512i codes) const { return _mm512_permutexvar_epi16(codes, table); }

  // A high product is a shift in the units of products, which leaves those of shifts to the lookups of a single row.
  template <int rows>
  static __m512i next(__m512i codes) {
    return rows == 1 ? _mm512_mulhi_epu16(codes, _mm512_set1_epi16(1 << 12)) : _mm512_srli_epi16(codes, 4);
  }

  static __m512 multiply_add(__m512 sum, __m512 a, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace

void fp4_matmul_tiles_avx512bf16(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(p.weight.table)), 16);
  const __m256i halves = _mm512_cvtepi32_epi16(bits);
  const HalfPath path{{}, _mm512_inserti64x4(_mm512_castsi256_si512(halves), halves, 1)};
  multiply_tiles(p, path, begin, end);
}

}  // namespace bitmill::detail

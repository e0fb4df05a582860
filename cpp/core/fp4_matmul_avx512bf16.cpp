// SPDX-License-Identifier: Apache-2.0
// bfloat16 activations times FP4 weights whose 16 values are bfloat16s: vpermw decodes the codes of two columns of 16
// outputs, vdpbf16ps multiplies them with a pair of activations and sums in float32. Products are exact. That
// instruction takes subnormal numbers as 0.
#include "fp4_tiles_avx512.h"

namespace bitmill::detail {
namespace {

struct HalfPath {
  using Values = __m512i;
  static constexpr bool kSingles = false;
  static constexpr int kSteps = 4;  // step j takes columns 8 w + j and 8 w + 4 + j of word w
  __m512i table;                    // twice: vpermw takes 5 bits

  // Rows that are missing count as zeros.
  static int64_t fours(int64_t rows) { return ceil_div(rows, 4) * 4; }

  template <int rows>
  void pack(const BFloat16* x, int64_t k, float* out, int64_t count) const {
    static_assert(rows == 8 || rows == 4);
    // 32 columns: words 0 ... 3, and of each columns 0 4 1 5 2 6 3 7.
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  4,  1,  5,  2,  6,  3,  7,  8,  12, 9,  13, 10, 14, 11, 15,
                                                        16, 20, 17, 21, 18, 22, 19, 23, 24, 28, 25, 29, 26, 30, 27, 31};
    const __m512i order = _mm512_load_si512(kOrder);
    const int64_t pairs = word_count(k, 4) * kSteps;
    for (int64_t column = 0; column < k; column += 32) {
      const int64_t left = k - column;
      const __mmask32 columns = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
      for (int half = 0; half < rows; half += 4) {
        __m512 z[4];
        for (int i = 0; i < 4; ++i) {
          const __mmask32 lanes = half + i < count ? columns : 0;
          const __m512i values = _mm512_maskz_loadu_epi16(lanes, x + (lanes ? (half + i) * k + column : 0));
          z[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, values));
        }
        transpose4(z);
        for (int i = 0; i < 4; ++i) {
          const int64_t first = column / 2 + i;
          const auto put = [&](int64_t pair, __m128 four) {
            if (pair < pairs) _mm_storeu_ps(out + pair * rows + half, four);
          };
          put(first, _mm512_castps512_ps128(z[i]));
          put(first + 4, _mm512_extractf32x4_ps(z[i], 1));
          put(first + 8, _mm512_extractf32x4_ps(z[i], 2));
          put(first + 12, _mm512_extractf32x4_ps(z[i], 3));
        }
      }
    }
  }

  __m512i lookup(__m512i codes) const { return _mm512_permutexvar_epi16(codes, table); }
  static __m512i next(__m512i codes) { return _mm512_srli_epi16(codes, 4); }
  static __m512 multiply_add(__m512 sum, __m512 a, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace

void fp4_matmul_tiles_avx512bf16(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(p.weight.table)), 16);
  const __m256i halves = _mm512_cvtepi32_epi16(bits);
  const HalfPath path{_mm512_inserti64x4(_mm512_castsi256_si512(halves), halves, 1)};
  multiply_tiles<HalfPath, BFloat16>(p, path, begin, end);
}

}  // namespace bitmill::detail

// SPDX-License-Identifier: Apache-2.0
// Float activations times FP4 weights in float32: vpermps decodes a code of 16 outputs from the table of 16 values (it
// ignores the upper bits of its index), fused multiply-adds do the rest.
#include "fp4_tiles_avx512.h"

namespace bitmill::detail {
namespace {

template <class T>
struct FloatPath : FloatSums<T> {
  using Values = __m512;
  static constexpr int kSteps = 8;
  __m512 table;

  static int64_t fours(int64_t rows) { return rows / 4 * 4; }

  static __m512 elements(const T* x, int64_t k, int64_t first) { return load16(x + first, first_lanes(k - first)); }

  __m512 lookup(__m512i codes) const { return _mm512_permutexvar_ps(codes, table); }
  template <int rows>
  static __m512i next(__m512i codes) {
    return _mm512_srli_epi32(codes, 4);
  }
  static __m512 multiply_add(__m512 sum, __m512 a, __m512 w) { return _mm512_fmadd_ps(a, w, sum); }
};

}  // namespace

void fp4_matmul_tiles_avx512(const Fp4MatmulParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, p.x, [&]<class T>(const T*) {
    const FloatPath<T> path{{}, _mm512_loadu_ps(p.weight.table)};
    multiply_tiles(p, path, begin, end);
  });
}

}  // namespace bitmill::detail

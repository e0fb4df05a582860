// SPDX-License-Identifier: Apache-2.0
// The casts of the fp4 family on the CPU. Schemas: python/bitmill/ops/{fp4,nvfp4,codebook4}.py.
#include "boxing.h"
#include "fp4_casts.h"

namespace bitmill {
namespace {

class CpuCasts : public CpuCall {
 public:
  using CpuCall::CpuCall;

  static Status run(const Fp4CastParams& p) { return fp4_cast(threaded(p)); }
  static Status run(const Mxfp4QuantizeParams& p) { return mxfp4_quantize(threaded(p)); }
  static Status run(const Nvfp4QuantizeParams& p) { return nvfp4_quantize(threaded(p)); }
  static Status run(const Nvfp4DequantizeParams& p) { return nvfp4_dequantize(threaded(p)); }
  static Status run(const Codebook4QuantizeParams& p) { return codebook4_quantize(threaded(p)); }
  static Status run(const Codebook4DequantizeParams& p) { return codebook4_dequantize(threaded(p)); }
  static Status fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values) {
    return bitmill::fp4_uncast(packed, m, k, format, values, torch_parallel_for);
  }
  static Status mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values) {
    return bitmill::mxfp4_dequantize(packed, scale, m, k, values, torch_parallel_for);
  }
  static Status e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes) {
    return bitmill::e8m0_cast(x, dtype, count, up, bytes);
  }
  static Status e8m0_uncast(const uint8_t* bytes, int64_t count, float* values) {
    return bitmill::e8m0_uncast(bytes, count, values);
  }

 private:
  template <class Params>
  static Params threaded(Params p) {
    p.parallel_for = torch_parallel_for;
    return p;
  }
};

}  // namespace
}  // namespace bitmill

STABLE_TORCH_LIBRARY_IMPL(bitmill, CPU, m) { BITMILL_FP4_CASTS(m, CpuCasts); }

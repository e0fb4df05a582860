// SPDX-License-Identifier: Apache-2.0
// The functions of cpp/core that have kernels for a GPU. Every launcher checks its Params, starts its kernels on
// `stream` of the current device and returns at once. Pointers are device pointers; parallel_for has no say. Integers,
// bits and codes are those of the function of the same name in core, and so are floats wherever core fixes the order of
// every operation. Weight tiles begin at a multiple of 16 bytes.
#pragma once

#include <optional>

#include "binary_attention.h"
#include "binary_matmul.h"
#include "bitpack.h"
#include "codebook4.h"
#include "fp4_matmul.h"
#include "salient_scatter.h"
#include "status.h"
#include "zoned.h"

struct CUstream_st;

namespace bitmill::cuda {

using Stream = CUstream_st*;  // cudaStream_t

// `alpha`: one number on the device, whose half then is the threshold, or null.
Status launch_bitpack(const BitpackParams& params, Stream stream, const float* alpha = nullptr);

Status launch_binary_matmul(const BinaryMatmulParams& params, Stream stream);

// Each product is exact and sums are of floats, in another order than core's. `out` is of `out_dtype`, if one is named.
Status launch_binary_weight_matmul(const BinaryWeightMatmulParams& params, Stream stream,
                                   std::optional<Dtype> out_dtype = std::nullopt);

// The learned steps of the elastic rule, each a number on the device: slope, threshold and steps are made of them
// there, with slope = step of q times that of k, times `scaling` or divided by it. Null: those of the Params count.
struct AttentionSteps {
  const float *q = nullptr, *k = nullptr, *a = nullptr, *v = nullptr;  // v null: no step of the context
  double scaling = 1.0;
  bool divide = false;
};

// Words of scratch memory that a call needs.
int64_t binary_attention_scratch(const BinaryAttentionParams& params);
// The offsets in the Params lie on the host, each at no more than two even distances: bad_argument otherwise. Sequences
// of unequal lengths are launched one by one. The elastic rule's weights are those of the device's exp, which may
// differ from the host's in the last place of a double.
Status launch_binary_attention(const BinaryAttentionParams& params, int32_t* scratch, Stream stream,
                               const AttentionSteps& steps = {});

// NanPolicy::error alone waits for the GPU, and needs a number on the device, `found`.
Status launch_fp4_cast(const Fp4CastParams& params, Stream stream, int32_t* found = nullptr);
Status launch_fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values, Stream stream);
Status launch_e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes, Stream stream);
Status launch_e8m0_uncast(const uint8_t* bytes, int64_t count, float* values, Stream stream);
Status launch_mxfp4_quantize(const Mxfp4QuantizeParams& params, Stream stream);
Status launch_mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values,
                               Stream stream);
Status launch_nvfp4_quantize(const Nvfp4QuantizeParams& params, Stream stream);
Status launch_nvfp4_dequantize(const Nvfp4DequantizeParams& params, Stream stream);
Status launch_codebook4_quantize(const Codebook4QuantizeParams& params, Stream stream);
Status launch_codebook4_dequantize(const Codebook4DequantizeParams& params, Stream stream);

// Float activations only. The values of the codes: `table`, on the host, or the weight's own, on the device. Sums as
// above.
Status launch_fp4_matmul(const Fp4MatmulParams& params, const Fp4Table* table, Stream stream);

// Of FPQ: `input_scale`, one number on the device, or null for that of the Params. Nothing is looked at before: a shift
// above the largest counts as that.
Status launch_fp4_activations(const Fp4ActivationsParams& params, Stream stream, const float* input_scale = nullptr);

// int8 activations, bit for bit as core multiplies them; the table as `integers`, groups of 16 or 32 columns or one.
Status launch_fp4_int8_matmul(const Fp4MatmulParams& params, const Fp4Integers& integers, Stream stream);

// Float activations only; sums as above. Scratch memory: signs [m, n], and totals [m, groups] if there is a mu. Nothing
// is looked at before: contradictory arrays give a wrong result, never a read outside of them.
Status launch_salient_matmul(const SalientMatmulParams& params, float* signs, float* totals, Stream stream);

// What the salient columns of a block take.
struct ZonedPlace {
  int32_t salient;      // so many columns,
  int32_t zone_column;  // and from here on those of salient_zone
};
// Sums as above. Scratch memory: places [blocks], and ordered [m, k], float32 if there is a column_scale and else of
// x's dtype. As above, contradictory arrays give a wrong result.
Status launch_zoned_matmul(const ZonedMatmulParams& params, ZonedPlace* places, void* ordered, Stream stream);

// Of the current device.
struct Device {
  int multiprocessors = 0;
  int compute_capability = 0;  // the major number
};
Device current_device();

// What the CUDA runtime said when a launcher last answered Status::device_error in this thread.
const char* last_error();

}  // namespace bitmill::cuda

// SPDX-License-Identifier: Apache-2.0
// 4-bit floats: the formats as data, casts of floats to codes and back, E8M0 scales, MXFP4 blocks, and
// weights (tiles with b = 4, layout.h). A code is the sign in bit 3 and the index of the magnitude, ascending, in bits
// 2..0; code 8 is -0. Packed rows: uint8 [m, ceil(k / 2)], element 0 in the low nibble, an odd k padded with code 0.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "floats.h"
#include "layout.h"
#include "parallel.h"
#include "philox.h"
#include "status.h"

namespace bitmill {

// The name says the bits: E exponent bits, M mantissa bits, no infinity, no NaN. The bias is 2^(E - 1) - 1.
struct Fp4Format {
  int exponent_bits, mantissa_bits, bias;
};
inline constexpr Fp4Format kE2M1{2, 1, 1};  // 0 0.5 1 1.5 2 3 4 6
inline constexpr Fp4Format kE1M2{1, 2, 0};  // 0 0.5 1 1.5 2 2.5 3 3.5
inline constexpr Fp4Format kE3M0{3, 0, 3};  // 0 0.25 0.5 1 2 4 8 16

inline constexpr int64_t kMxBlock = 32;  // columns that share an E8M0 scale in MXFP4

enum class NanPolicy {
  max,   // code 7 for both signs, as cuda_fp4.h
  zero,  // code 0
  error  // the cast answers Status::bad_argument
};

// Which of the two values around it a magnitude is cast to. Above the largest value it is that one, always.
enum class Rounding {
  nearest_even,  // the nearer one; ties as fp4_steps says
  stochastic,    // the upper one with probability (magnitude - lower) / (upper - lower): fp4_round_up
  toward_zero,   // the lower one
  half_away      // the nearer one, or of two equally near the upper one
};

// How the scale 2^E of an MXFP4 block follows from its largest magnitude.
enum class ScaleRule {
  floor,  // floor(log2 amax) - 2, the OCP text: magnitudes above 6 * 2^E saturate
  rceil,  // the smallest power of two that is at least fl(amax * fl(1 / 6))
  ceil,   // ceil(log2 amax) - 2
  even    // floor after amax is rounded to one mantissa bit, half up
};

struct Fp4CastParams {
  const void* x = nullptr;  // [m, k], rows `row_stride` elements apart
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0, row_stride = 0;
  Fp4Format format = kE2M1;
  NanPolicy nan = NanPolicy::max;
  Rounding rounding = Rounding::nearest_even;
  RandomStream random = {};   // of Rounding::stochastic; element i, j is i * k + j
  uint8_t* packed = nullptr;  // [m, ceil(k / 2)]
  ParallelFor parallel_for = serial_for;
};
// Answers bad_argument for a NaN under NanPolicy::error.
Status fp4_cast(const Fp4CastParams& params);
Status fp4_uncast(const uint8_t* packed, int64_t m, int64_t k, Fp4Format format, float* values,
                  ParallelFor parallel_for = serial_for);

// log2 |x| rounded down or up, plus 127, in 0 ... 254; NaN is 255. The sign is ignored.
Status e8m0_cast(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes);
Status e8m0_uncast(const uint8_t* bytes, int64_t count, float* values);

struct Mxfp4QuantizeParams {
  const void* x = nullptr;  // [m, k], rows `row_stride` elements apart
  Dtype dtype = Dtype::f32;
  int64_t m = 0, k = 0, row_stride = 0;
  ScaleRule rule = ScaleRule::floor;
  Rounding rounding = Rounding::nearest_even;  // of the codes
  RandomStream random = {};                    // of Rounding::stochastic; element i, j is i * k + j
  uint8_t* packed = nullptr;                   // [m, ceil(k / 2)], E2M1
  uint8_t* scale = nullptr;                    // [m, ceil(k / 32)], E8M0
  ParallelFor parallel_for = serial_for;
};
// A block with a NaN or an infinity has scale 255 (NaN) and codes 0.
Status mxfp4_quantize(const Mxfp4QuantizeParams& params);
Status mxfp4_dequantize(const uint8_t* packed, const uint8_t* scale, int64_t m, int64_t k, float* values,
                        ParallelFor parallel_for = serial_for);

// w[o, j] = scale[o, j / group_size] * table[code[o, j]]; one of `scale` and `scale_bytes` is given. Bytes are E8M0, or
// with a global_scale E4M3: the scale is fl(byte * global_scale), and w fl(fl(byte * table[code]) * global_scale).
struct Fp4Weight {
  const int32_t* tiles = nullptr;  // [tile_count(n), word_count(k, 4), 16]
  int64_t n = 0, k = 0;
  const float* table = nullptr;          // [16], the value of each code
  const float* scale = nullptr;          // [n, groups]
  const uint8_t* scale_bytes = nullptr;  // [n, groups]
  const float* global_scale = nullptr;   // one number or null
  int64_t group_size = 0;                // columns a group, a multiple of 8; 0: one group

  int64_t group_width() const { return group_size > 0 ? group_size : k > 0 ? k : 1; }
  int64_t groups() const { return group_size > 0 ? ceil_div(k, group_size) : 1; }
};
Status fp4_weight(const Fp4Weight& weight, float* values, ParallelFor parallel_for = serial_for);

// A table as integers of magnitude up to 127 times a power of two.
struct Fp4Integers {
  int8_t value[16];
  float unit;
};
bool fp4_integers(const float* table, Fp4Integers& integers);  // false: the table is not that
// Columns whose products with int8 activations have a sum within int32, whatever the codes.
int64_t fp4_int8_columns(const Fp4Integers& integers);

// A magnitude is an integer number of units: units of 2^(p - bias - M) in the binade of exponent field p,
// where field 0 (subnormal) shares the binade of field 1.
struct Fp4Magnitude {
  int integer;
  float unit;
};
static constexpr Fp4Magnitude fp4_magnitude(Fp4Format format, int index) {
  const int field = index >> format.mantissa_bits, hidden = 1 << format.mantissa_bits;
  const int exponent = (field > 0 ? field : 1) - format.bias - format.mantissa_bits;
  return {(field > 0 ? hidden : 0) + (index & (hidden - 1)),
          std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23)};
}

// first[i]: the smallest bits of a float magnitude that are cast to index i + 1 or above; for Rounding::stochastic, to
// index i + 1 before fp4_round_up. With nearest_even the middle of two values goes to the even one of the two integers
// in the lower value's binade. With a mantissa that is IEEE's rule; E3M0's integers are 0, 1, 2 and then 1, 2 in each
// binade, so all its ties but the first go up (LLM-FP4, quantiser).
struct Fp4Steps {
  uint32_t first[7];
};
static constexpr Fp4Steps fp4_steps(Fp4Format format, Rounding rounding = Rounding::nearest_even) {
  const bool nearest = rounding == Rounding::nearest_even || rounding == Rounding::half_away;
  Fp4Steps steps{};
  for (int i = 0; i < 7; ++i) {
    const Fp4Magnitude below = fp4_magnitude(format, i);
    const float step = below.unit * (static_cast<float>(below.integer) + (nearest ? 0.5f : 1.0f));
    const bool tie_goes_down = rounding == Rounding::nearest_even && below.integer % 2 == 0;
    steps.first[i] = std::bit_cast<uint32_t>(step) + (tie_goes_down ? 1u : 0u);
  }
  return steps;
}

struct Fp4Table {
  float value[16];
};
static constexpr Fp4Table fp4_table(Fp4Format format) {
  Fp4Table table{};
  for (int i = 0; i < 8; ++i) {
    const Fp4Magnitude magnitude = fp4_magnitude(format, i);
    table.value[i] = magnitude.unit * static_cast<float>(magnitude.integer);
    table.value[i + 8] = -table.value[i];
  }
  return table;
}

// bitsandbytes' tables: quantiles of a normal distribution, and an FP4 that is not E2M1.
inline constexpr Fp4Table kNf4{{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                                -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                                0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                                0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};
inline constexpr Fp4Table kBnbFp4{{0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f,
                                   0.1666666716337204f, 0.25f, 0.0f, -0.0052083334885537624f, -0.6666666865348816f,
                                   -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f}};

// The code of any float but NaN.
static constexpr uint32_t fp4_code(uint32_t bits, const Fp4Steps& steps) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t index = 0;
  for (const uint32_t first : steps.first) index += magnitude >= first ? 1u : 0u;
  return ((bits >> 28) & 8u) | index;
}

// Of each index: its value, and 2^32 / the distance to the next one, which is one unit.
struct Fp4Distances {
  float value[8], inverse[8];
};
static constexpr Fp4Distances fp4_distances(Fp4Format format) {
  Fp4Distances distances{};
  for (int i = 0; i < 8; ++i) {
    const Fp4Magnitude magnitude = fp4_magnitude(format, i);
    distances.value[i] = magnitude.unit * static_cast<float>(magnitude.integer);
    distances.inverse[i] = 0x1p32f / magnitude.unit;
  }
  return distances;
}

// Stochastic rounding of any float but NaN, from its code toward zero: the next code if
//   floor(2^32 (|x| - value) / distance) + random >= 2^32.
// The difference and the product are exact, so the probability is too, but for what lies below 2^-32.
static constexpr uint32_t fp4_round_up(uint32_t code, uint32_t bits, const Fp4Distances& distances, uint32_t random) {
  const uint32_t index = code & 7u;
  if (index == 7) return code;
  const float above = std::bit_cast<float>(bits & 0x7FFFFFFFu) - distances.value[index];
  const uint32_t chance = static_cast<uint32_t>(above * distances.inverse[index]);
  return code + (chance + random < chance ? 1u : 0u);  // the sum has a carry
}

// log2 of a finite magnitude plus 127, rounded, in 0 ... 255 (255: a magnitude above 2^127 rounded up).
static constexpr uint32_t biased_log2(uint32_t magnitude, bool up) {
  const uint32_t exponent = magnitude >> 23;
  // 2^-127, byte 0, is the subnormal 0x400000, so what lies at or below it does not round up to byte 1.
  const bool above = exponent == 0 ? magnitude > 0x400000u : (magnitude & 0x7FFFFFu) != 0;
  return exponent + (up && above ? 1u : 0u);
}

static constexpr uint8_t e8m0_from_bits(uint32_t bits, bool up) {
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 255;
  const uint32_t byte = biased_log2(magnitude, up);
  return static_cast<uint8_t>(byte < 254u ? byte : 254u);
}

static constexpr float e8m0_to_float(uint8_t byte) {
  if (byte == 255) return std::numeric_limits<float>::quiet_NaN();
  return std::bit_cast<float>(byte == 0 ? 0x400000u : static_cast<uint32_t>(byte) << 23);
}

// E4M3: 4 exponent bits with bias 7, 3 mantissa bits.
static constexpr float e4m3_to_float(uint8_t byte) {
  const uint32_t magnitude = byte & 0x7Fu;
  if (magnitude == 0x7F) return std::numeric_limits<float>::quiet_NaN();
  const float value =
      magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : std::bit_cast<float>((magnitude << 20) + (120u << 23));
  return byte > 0x7F ? -value : value;
}

// The scale at an index of [n, groups].
static constexpr float weight_scale(const Fp4Weight& w, int64_t index) {
  if (w.scale) return w.scale[index];
  const uint8_t byte = w.scale_bytes[index];
  return w.global_scale ? e4m3_to_float(byte) * *w.global_scale : e8m0_to_float(byte);
}

// Scale byte of an MXFP4 block from the bits of its largest magnitude.
static constexpr uint8_t mxfp4_scale(uint32_t amax, ScaleRule rule) {
  if (rule == ScaleRule::even) amax += amax < 0x7F800000u ? 1u << 21 : 0u;
  if (amax >= 0x7F800000u) return 255;
  if (rule == ScaleRule::rceil) {
    return e8m0_from_bits(std::bit_cast<uint32_t>(std::bit_cast<float>(amax) * (1.0f / 6.0f)), true);
  }
  const uint32_t byte = biased_log2(amax, rule == ScaleRule::ceil);
  return static_cast<uint8_t>(byte > 2 ? byte - 2 : 0);
}

// A block's scale byte, and what its values are multiplied with before the cast; the codes of one that is not `valid`
// are 0.
struct ScaledBlock {
  uint8_t byte;
  float inverse;
  bool valid;
};
static constexpr ScaledBlock mxfp4_scaled(uint32_t amax, ScaleRule rule) {
  const uint8_t byte = mxfp4_scale(amax, rule);
  // 1 / 2^E is exact and normal: a finite block has at most byte 253.
  return {byte, std::bit_cast<float>((254u - (byte < 253 ? byte : 253u)) << 23), byte != 255};
}

namespace detail {
Status fp4_weight_check(const Fp4Weight& weight);  // bad_size or bad_argument
// Rows [begin, end) each. A cast answers whether there was a NaN.
bool fp4_cast_rows_generic(const Fp4CastParams& params, int64_t begin, int64_t end);
bool fp4_cast_rows_avx2(const Fp4CastParams& params, int64_t begin, int64_t end);
bool fp4_cast_rows_stochastic_avx2(const Fp4CastParams& params, int64_t begin, int64_t end);
bool fp4_cast_rows_avx512(const Fp4CastParams& params, int64_t begin, int64_t end);
bool fp4_cast_rows_stochastic_avx512(const Fp4CastParams& params, int64_t begin, int64_t end);
void fp4_uncast_rows_generic(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                             int64_t end);
void fp4_uncast_rows_avx2(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                          int64_t end);
void fp4_uncast_rows_avx512(const uint8_t* packed, int64_t k, Fp4Format format, float* values, int64_t begin,
                            int64_t end);
void mxfp4_quantize_rows_generic(const Mxfp4QuantizeParams& params, int64_t begin, int64_t end);
void mxfp4_quantize_rows_avx2(const Mxfp4QuantizeParams& params, int64_t begin, int64_t end);
void mxfp4_quantize_rows_stochastic_avx2(const Mxfp4QuantizeParams& params, int64_t begin, int64_t end);
void mxfp4_quantize_rows_avx512(const Mxfp4QuantizeParams& params, int64_t begin, int64_t end);
void mxfp4_quantize_rows_stochastic_avx512(const Mxfp4QuantizeParams& params, int64_t begin, int64_t end);
void mxfp4_dequantize_rows_generic(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                   int64_t end);
void mxfp4_dequantize_rows_avx2(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                int64_t end);
void mxfp4_dequantize_rows_avx512(const uint8_t* packed, const uint8_t* scale, int64_t k, float* values, int64_t begin,
                                  int64_t end);
void e8m0_cast_generic(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes);
void e8m0_cast_avx2(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes);
void e8m0_cast_avx512(const void* x, Dtype dtype, int64_t count, bool up, uint8_t* bytes);
void e8m0_uncast_generic(const uint8_t* bytes, int64_t count, float* values);
void e8m0_uncast_avx2(const uint8_t* bytes, int64_t count, float* values);
void e8m0_uncast_avx512(const uint8_t* bytes, int64_t count, float* values);
// Rows of tiles [begin, end); k above 0.
void fp4_weight_tiles_avx2(const Fp4Weight& weight, float* values, int64_t begin, int64_t end);
}  // namespace detail

}  // namespace bitmill

// csrc/common/convert.cuh: conversions between floating-point formats, to the bit.
#pragma once

#include "intrinsics.hpp"

namespace llmkernels::emulator {

// The value of a binary16: exact, since binary32 holds every one of them.
inline float cvt_f32_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0x1f) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float magnitude =
      static_cast<float>(fraction) * 5.9604644775390625e-8f;  // subnormal: 2^-24
  return sign ? -magnitude : magnitude;
}

inline uint16_t cvt_rn_f16_f32(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on the nearest is infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lets the float addition round at 2^-24, the subnormal step.
    const float shifted = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline uint32_t cvt_rn_bf16_f32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline uint32_t cvt_rn_f16x2_f32(float high, float low) {
  return uint32_t{cvt_rn_f16_f32(high)} << 16 | cvt_rn_f16_f32(low);
}

inline uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  return cvt_rn_bf16_f32(high) << 16 | cvt_rn_bf16_f32(low);
}

// A NaN keeps its upper bits, as in the code that ptxas makes of the instruction.
inline uint32_t cvt_rna_tf32_f32(float value) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & ~0x1fffu;
}

}  // namespace llmkernels::emulator

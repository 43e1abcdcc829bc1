// float16 and bfloat16 to and from float32, rounding to nearest even, NaN kept. All arithmetic is
// in float32.
#pragma once

#include "platform.cuh"

#include "dtype.h"

namespace llmkernels {

// What a kernel is compiled for: the dtype of its main input, and the columns of it that 16 bytes
// hold and one thread moves at once.
struct Float16 {
  static constexpr int kColumns = 8;
  __device__ static constexpr Dtype dtype(Dtype) { return Dtype::kFloat16; }
};

struct BFloat16 {
  static constexpr int kColumns = 8;
  __device__ static constexpr Dtype dtype(Dtype) { return Dtype::kBFloat16; }
};

struct Float32 {
  static constexpr int kColumns = 4;
  __device__ static constexpr Dtype dtype(Dtype) { return Dtype::kFloat32; }
};

// Any dtype, one column at a time: for operands that are not aligned to vectors. Neighbouring
// threads have neighbouring columns, so that sectors are still filled.
struct AnyElement {
  static constexpr int kColumns = 1;
  __device__ static constexpr Dtype dtype(Dtype operand) { return operand; }
};

__host__ __device__ constexpr int bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

#ifdef LLMKERNELS_EMULATOR

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

#else

__device__ __forceinline__ float cvt_f32_f16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint32_t cvt_rn_f16x2_f32(float high, float low) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

#endif

// Adjacent columns of one thread as they lie in memory: a word each in float32, else two in a word,
// the lower column in the lower half, so that a 16-bit dtype leaves the upper half of the words
// unused.
template <int kColumns>
struct Raw {
  uint32_t words[kColumns];
};

// Where dtype is a constant the branches fold away; where it is an operand's it is uniform over the
// grid.
template <int kColumns>
__device__ __forceinline__ void unpack(Dtype dtype, const Raw<kColumns>& raw,
                                       float (&values)[kColumns]) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) values[j] = __uint_as_float(raw.words[j]);
  } else if (dtype == Dtype::kBFloat16) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      values[j] = __uint_as_float(raw.words[j / 2] << 16);
      if constexpr (kColumns > 1) values[j + 1] = __uint_as_float(raw.words[j / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      values[j] = cvt_f32_f16(static_cast<uint16_t>(raw.words[j / 2]));
      if constexpr (kColumns > 1)
        values[j + 1] = cvt_f32_f16(static_cast<uint16_t>(raw.words[j / 2] >> 16));
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void pack(Dtype dtype, const float (&values)[kColumns],
                                     Raw<kColumns>& raw) {
  if (dtype == Dtype::kFloat32) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) raw.words[j] = __float_as_uint(values[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; j += 2) {
    const float high = kColumns > 1 ? values[(j + 1) % kColumns] : 0.0f;
    raw.words[j / 2] = dtype == Dtype::kBFloat16 ? cvt_rn_bf16x2_f32(high, values[j])
                                                 : cvt_rn_f16x2_f32(high, values[j]);
  }
}

}  // namespace llmkernels

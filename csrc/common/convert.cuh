// float16 and bfloat16 to and from float32, rounding to nearest even, NaN kept, and rounding to
// tf32. All arithmetic is in float32.
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

using emulator::cvt_f32_f16;
using emulator::cvt_rn_bf16x2_f32;
using emulator::cvt_rn_f16x2_f32;
using emulator::cvt_rna_tf32_f32;

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

// To tf32, the nearest, ties away from zero: a float32 whose lower 13 bits are zero, as mma.sync
// wants it.
__device__ __forceinline__ uint32_t cvt_rna_tf32_f32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

#endif

// Two neighbouring elements of 16 bits in a word, the lower column in the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (Element::dtype({}) == Dtype::kBFloat16) return cvt_rn_bf16x2_f32(high, low);
  return cvt_rn_f16x2_f32(high, low);
}

template <typename Element>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (Element::dtype({}) == Dtype::kBFloat16)
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  return make_float2(cvt_f32_f16(static_cast<uint16_t>(word)),
                     cvt_f32_f16(static_cast<uint16_t>(word >> 16)));
}

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

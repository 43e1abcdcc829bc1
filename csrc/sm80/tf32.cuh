// float32 products on tensor cores: one product of tf32 (11 significant bits), or three (3xtf32),
// whose operands are split into x = big + small with 22 bits between them.
#pragma once

#include "mma.cuh"

namespace llmkernels {

// In place: words that hold float32 are rounded to tf32.
template <int kWords>
__device__ __forceinline__ void round_to_tf32(uint32_t (&words)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) words[i] = cvt_rna_tf32_f32(__uint_as_float(words[i]));
}

// ``words`` become the big parts. The small part of an infinity is NaN, and so are its products.
template <int kWords>
__device__ __forceinline__ void split_to_tf32(uint32_t (&words)[kWords],
                                              uint32_t (&small)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const float value = __uint_as_float(words[i]);
    words[i] = cvt_rna_tf32_f32(value);
    small[i] = cvt_rna_tf32_f32(value - __uint_as_float(words[i]));
  }
}

// D += A B of split operands, small terms first; small * small lies below float32's last place.
__device__ __forceinline__ void mma_m16n8k8_3xtf32(float (&d)[4], const uint32_t (&a_big)[4],
                                                   const uint32_t (&a_small)[4], uint32_t b0_big,
                                                   uint32_t b1_big, uint32_t b0_small,
                                                   uint32_t b1_small) {
  mma_m16n8k8_tf32(d, a_small, b0_big, b1_big);
  mma_m16n8k8_tf32(d, a_big, b0_small, b1_small);
  mma_m16n8k8_tf32(d, a_big, b0_big, b1_big);
}

}  // namespace llmkernels

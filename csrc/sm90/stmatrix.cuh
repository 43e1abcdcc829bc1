// stmatrix (PTX ISA, sm_90): a warp stores four 8 x 8 matrices of 16-bit elements, the inverse of
// ldmatrix_x4: lanes' words, row addresses and .trans are as in ../sm80/ldmatrix.cuh.
//
// Before sm_90 the same is done in four stores of 4 bytes, to addresses fetched by shuffles. The
// 16-bit elements of .trans lie in different rows: eight stores of 2 bytes.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::stmatrix_x4;
using emulator::stmatrix_x4_trans;

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void stmatrix_x4(uint32_t row_smem, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_smem),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&words)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row_smem),
      "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
      : "memory");
}

#else

__device__ __forceinline__ void stmatrix_x4(uint32_t row_smem, const uint32_t (&words)[4]) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
    const uint32_t row = __shfl_sync(0xffffffffu, row_smem, 8 * m + lane / 4);
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(row + lane % 4 * 4), "r"(words[m]) : "memory");
  }
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&words)[4]) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (uint32_t m = 0; m < 4; ++m) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = __shfl_sync(0xffffffffu, row_smem, 8 * m + lane % 4 * 2 + half);
      const auto element = static_cast<uint16_t>(words[m] >> 16 * half);
      asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(row + lane / 4 * 2), "h"(element) : "memory");
    }
  }
}

#endif

}  // namespace llmkernels

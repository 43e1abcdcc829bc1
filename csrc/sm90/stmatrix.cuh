// stmatrix (PTX ISA, sm_90): a warp stores four 8 x 8 matrices of 16-bit elements, the inverse of
// ldmatrix_x4: lanes' words, row addresses and .trans are as in ../sm80/ldmatrix.cuh. On earlier
// GPUs the same is done by shuffles of the addresses and a lane's own stores.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

// Four stores of 4 bytes: without conflicts where ldmatrix has none.
__device__ __forceinline__ void stmatrix_x4_by_shuffles(uint32_t row_smem,
                                                        const uint32_t (&words)[4]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned m = 0; m < 4; ++m) {
    const uint32_t row = __shfl_sync(0xffffffffu, row_smem, static_cast<int>(8 * m + lane / 4));
    *reinterpret_cast<uint32_t*>(shared_pointer(row + lane % 4 * 4)) = words[m];
  }
}

// A word's two elements belong to different rows: eight stores of 2 bytes, four rows by eight
// columns each.
__device__ __forceinline__ void stmatrix_x4_trans_by_shuffles(uint32_t row_smem,
                                                              const uint32_t (&words)[4]) {
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned i = 0; i < 8; ++i) {
    const unsigned m = i / 2, half = i % 2;
    const uint32_t row =
        __shfl_sync(0xffffffffu, row_smem, static_cast<int>(8 * m + lane % 4 * 2 + half));
    *reinterpret_cast<uint16_t*>(shared_pointer(row + lane / 4 * 2)) =
        static_cast<uint16_t>(words[m] >> 16 * half);
  }
}

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
  stmatrix_x4_by_shuffles(row_smem, words);
}

__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&words)[4]) {
  stmatrix_x4_trans_by_shuffles(row_smem, words);
}

#endif

}  // namespace llmkernels

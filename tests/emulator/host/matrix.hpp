// csrc/sm80/ldmatrix.cuh, csrc/sm80/mma.cuh, csrc/sm90/stmatrix.cuh: instructions of a whole warp.
#pragma once

#include <cstdint>

namespace llmkernels::emulator {

void ldmatrix_x1(uint32_t (&words)[1], uint32_t row_smem);
void ldmatrix_x2(uint32_t (&words)[2], uint32_t row_smem);
void ldmatrix_x4(uint32_t (&words)[4], uint32_t row_smem);
void ldmatrix_x1_trans(uint32_t (&words)[1], uint32_t row_smem);
void ldmatrix_x2_trans(uint32_t (&words)[2], uint32_t row_smem);
void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t row_smem);

void stmatrix_x4(uint32_t row_smem, const uint32_t (&words)[4]);
void stmatrix_x4_trans(uint32_t row_smem, const uint32_t (&words)[4]);

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace llmkernels::emulator

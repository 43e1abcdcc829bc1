// ldmatrix (PTX ISA, sm_75): a warp loads one, two or four 8 x 8 matrices of 16-bit elements from
// shared memory into fragments.
//
// The address of row r of matrix m, 16 bytes at a multiple of 16, is that of lane 8 m + r; further
// lanes' addresses are ignored. With g = lane / 4 and t = lane % 4, word m of a lane then holds of
// matrix m
//   row g, columns 2t (lower half) and 2t + 1
//   .trans: column g, rows 2t (lower half) and 2t + 1
// A row of 16 bytes may as well be four 32-bit elements: a lane gets element t of row g.
//
// All 32 lanes take part. ldmatrix orders nothing: what other lanes have written is seen after
// __syncwarp or a barrier.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::ldmatrix_x1;
using emulator::ldmatrix_x1_trans;
using emulator::ldmatrix_x2;
using emulator::ldmatrix_x2_trans;
using emulator::ldmatrix_x4;
using emulator::ldmatrix_x4_trans;

#else

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&words)[1], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\n"
               : "=r"(words[0])
               : "r"(row_smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&words)[2], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(row_smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row_smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&words)[1], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];\n"
               : "=r"(words[0])
               : "r"(row_smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&words)[2], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(row_smem)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], uint32_t row_smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row_smem)
               : "memory");
}

#endif

}  // namespace llmkernels

// mma.sync (PTX ISA, sm_80): a warp adds the product of a 16 x K and a K x 8 matrix to a 16 x 8
// matrix of float32, D += A B, all in registers.
//
// With g = lane / 4 and t = lane % 4 a lane holds, of 16-bit elements (K = 16, the column named
// first in the lower half):
//   a[0]  row g,     columns 2t, 2t + 1          b0  column g, rows 2t, 2t + 1
//   a[1]  row g + 8, columns 2t, 2t + 1          b1  column g, rows 2t + 8, 2t + 9
//   a[2]  row g,     columns 2t + 8, 2t + 9
//   a[3]  row g + 8, columns 2t + 8, 2t + 9
// of tf32 (K = 8):
//   a[0]  row g,     column t                    b0  column g, row t
//   a[1]  row g + 8, column t                    b1  column g, row t + 4
//   a[2]  row g,     column t + 4
//   a[3]  row g + 8, column t + 4
// and of the accumulator, always:
//   d[0], d[1]  row g,     columns 2t, 2t + 1
//   d[2], d[3]  row g + 8, columns 2t, 2t + 1
//
// Products are exact. Sums are not those of float32 arithmetic: terms are aligned to the largest
// and cut off one or two bits below its last place (Fasi et al., PeerJ Computer Science 7:e330).
#pragma once

#include "../common/convert.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::mma_m16n8k16_bf16;
using emulator::mma_m16n8k16_f16;
using emulator::mma_m16n8k8_tf32;

#else

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The operands are float32 that cvt_rna_tf32_f32 has rounded.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// K of one instruction.
template <typename Element>
inline constexpr int kMmaDepth = Element::dtype({}) == Dtype::kFloat32 ? 8 : 16;

// The instruction of an element type; Float32 stands for tf32.
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (Element::dtype({}) == Dtype::kFloat32) {
    mma_m16n8k8_tf32(d, a, b0, b1);
  } else if constexpr (Element::dtype({}) == Dtype::kBFloat16) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  } else {
    mma_m16n8k16_f16(d, a, b0, b1);
  }
}

}  // namespace llmkernels

// The two products of attention's kernels. Each warp adds to its own sums, 16 kM rows by 8 kN
// columns, and every B that it loads serves all of its rows.
#pragma once

#include "../sm80/fragments.cuh"
#include "../sm80/tf32.cuh"
#include "rows.cuh"

namespace llmkernels::attention {

// An A or B of mma.sync, ready to be multiplied.
template <typename Element>
struct Fragment {
  uint32_t words[4];
  __device__ __forceinline__ void prepare(bool) {}
};

template <>
struct Fragment<Float32> {
  uint32_t words[4];  // rounded to tf32
  uint32_t small[4];  // what the rounding left, where products are to be exact

  __device__ __forceinline__ void prepare(bool is_exact) {
    if (is_exact) {
      split_to_tf32(words, small);
    } else {
      round_to_tf32(words);
    }
  }
};

// sums += a b for the columns 8 half to 8 half + 7 of b. mma.sync cuts off what lies below the last
// place of its sums; where float32 is to be exact the products of each step are summed apart and
// added to the nearest, or errors of one sign would pile up.
template <typename Element>
__device__ __forceinline__ void multiply(float (&sums)[4], const Fragment<Element>& a,
                                         const Fragment<Element>& b, int half, bool is_exact) {
  if constexpr (Element::dtype({}) == Dtype::kFloat32) {
    if (is_exact) {
      float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      mma_m16n8k8_3xtf32(step, a.words, a.small, b.words[2 * half], b.words[2 * half + 1],
                         b.small[2 * half], b.small[2 * half + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[e] += step[e];
      return;
    }
  }
  mma<Element>(sums, a.words, b.words[2 * half], b.words[2 * half + 1]);
}

// The addresses of load_a, load_b and load_b_trans (fragments.cuh) for chunk ``chunk``, a multiple
// of 2, from that for chunk 0. Rows have a power of two of bytes and tiles begin at multiples of
// it, so that a step along a row flips bits of the address (swizzle.cuh): one instruction, and
// nothing for the compiler to keep in registers from one tile to the next.
__device__ __forceinline__ uint32_t at_chunk(uint32_t address, int chunk) {
  return address ^ static_cast<uint32_t>(chunk * kChunkBytes);
}

// sums += A B^T, A being rows a_row.. of a tile and B the first 8 kN rows of another: scores of
// queries and keys.
template <typename Element, int kRowBytes, int kM, int kN>
__device__ __forceinline__ void multiply_rows(float (&sums)[kM][kN][4], const unsigned char* a_tile,
                                              int a_row, const unsigned char* b_tile,
                                              bool is_exact) {
  static_assert((kRowBytes & (kRowBytes - 1)) == 0);
  const int lane = lane_id();
  const uint32_t a_smem =
      shared_address(a_tile) + swizzled<kRowBytes>(a_row + lane % 16, lane / 16);
  const uint32_t b_smem =
      shared_address(b_tile) + swizzled<kRowBytes>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll(kElementBytes<Element> == 4 ? 1 : 8)
  for (int chunk = 0; chunk < kRowBytes / kChunkBytes; chunk += 2) {
    Fragment<Element> a[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      ldmatrix_x4(a[i].words, at_chunk(a_smem, chunk) + 16 * i * kRowBytes);
      a[i].prepare(is_exact);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      Fragment<Element> b;
      ldmatrix_x4(b.words, at_chunk(b_smem, chunk) + 8 * n * kRowBytes);
      b.prepare(is_exact);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        multiply(sums[i][n], a[i], b, 0, is_exact);
        multiply(sums[i][n + 1], a[i], b, 1, is_exact);
      }
    }
  }
}

// Which rows of B, columns of the weights, anything in the warp's rows sees: in the others zeros
// stand in for what may be NaN and must not meet weights of 0. Bit 2 n + e of ``columns``: a lane's
// column 2t + e of accumulator n, and these are just the rows of B that the lane holds. kIsWhole:
// all are seen.
template <bool kIsWhole>
struct Seen {
  uint32_t columns = 0xffffffffu;

  // step: which 16 rows of B these are, or in 32 bits which 8.
  template <typename Element>
  __device__ __forceinline__ void keep(Fragment<Element>& b, int step) const {
    if constexpr (!kIsWhole) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t mask;
        if constexpr (kElementBytes<Element> == 4) {
          mask = 0u - (columns >> (2 * step + half) & 1);
        } else {
          const uint32_t pair = columns >> (4 * step + 2 * half);
          mask = (pair & 1) * 0xffffu | (pair >> 1 & 1) * 0xffff0000u;
        }
        b.words[half] &= mask;
        b.words[half + 2] &= mask;
      }
    }
  }
};

// sums += A B, A being accumulators, kept in registers and rounded to the element type, and B the
// first 8 kN rows of a tile: values by the weights of their keys.
template <typename Element, int kRowBytes, int kM, int kN, int kD, bool kIsWhole>
__device__ __forceinline__ void multiply_weights(float (&sums)[kM][kD][4],
                                                 const float (&weights)[kM][kN][4],
                                                 const unsigned char* b_tile, bool is_exact,
                                                 Seen<kIsWhole> seen) {
  constexpr bool kIs32 = kElementBytes<Element> == 4;
  constexpr int kStep = kIs32 ? 1 : 2;  // accumulators that make an A
  const int lane = lane_id();
  const uint32_t b_smem = shared_address(b_tile) + swizzled<kRowBytes>(lane % 16, lane / 16);
  // Of 32-bit elements the same by bytes from the start of shared memory, of the rows 2t and 2t + 1
  // that a lane's columns of an accumulator become (fragments.cuh, KOrder::kAccumulator).
  LLMKERNELS_SHARED(shared);
  int b_bytes[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    b_bytes[half] = static_cast<int>(b_tile - shared) +
                    swizzled_byte<kRowBytes>(k_of<KOrder::kAccumulator>(half), lane / 4 * 4);
  }
#pragma unroll
  for (int n = 0; n < kN; n += kStep) {
    Fragment<Element> a[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      if constexpr (kIs32) {
        a_of_accumulator_32(a[i].words, weights[i][n]);
      } else {
        a_of_accumulators<Element>(a[i].words, weights[i][n], weights[i][n + 1]);
      }
      a[i].prepare(is_exact);
    }
#pragma unroll
    for (int d = 0; d < kD; d += 2) {
      Fragment<Element> b;
      if constexpr (kIs32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int byte = (b_bytes[i % 2] ^ (2 * d + i / 2 * 2) * kChunkBytes) + 8 * n * kRowBytes;
          b.words[i] = *reinterpret_cast<const uint32_t*>(shared + byte);
        }
      } else {
        ldmatrix_x4_trans(b.words, at_chunk(b_smem, d) + 8 * n * kRowBytes);
      }
      seen.keep(b, n / kStep);
      b.prepare(is_exact);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        multiply(sums[i][d], a[i], b, 0, is_exact);
        multiply(sums[i][d + 1], a[i], b, 1, is_exact);
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void set_zero(float (&sums)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][n][e] = 0.0f;
}

}  // namespace llmkernels::attention

// Dropout of accumulators (mma.cuh). A lane has two of the four columns of a quad, so the lanes of
// a warp draw each quad once and hand the bits around: half of the Philox calls, or a quarter.
//
// ``counter`` is quad_counter of the tile's first row and column, ``quads`` those of a row; the
// rows of the tile are neighbouring rows of the mask. All 32 lanes take part.
#pragma once

#include "../common/dropout.cuh"
#include "../common/reduce.cuh"

namespace llmkernels {

// Of a tile of 16 rows and 16 columns, two accumulators side by side: bit 4 n + e is set where
// element e of accumulator n is kept.
__device__ __forceinline__ uint32_t kept_16x16(uint64_t seed, uint32_t threshold, uint64_t counter,
                                               uint32_t quads) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
  const uint64_t row = counter + uint64_t{quads} * g + t;
  const uint32_t drawn =
      kept_quad(seed, threshold, row) | kept_quad(seed, threshold, row + uint64_t{quads} * 8) << 4;
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    // Columns 2t and 2t + 1 of accumulator n are in quad 2n + t / 2.
    const uint32_t quad =
        __shfl_sync(kFullWarp, drawn, static_cast<int>(2 * n + t / 2), 4) >> t % 2 * 2;
    kept |= ((quad & 3) | (quad >> 2 & 12)) << 4 * n;
  }
  return kept;
}

// Of an accumulator that is a tile's transpose, 16 columns of the mask by 8 of its rows: bit e is
// set where element e is kept.
__device__ __forceinline__ uint32_t kept_8x16_trans(uint64_t seed, uint32_t threshold,
                                                    uint64_t counter, uint32_t quads) {
  const uint32_t lane = threadIdx.x % kWarpThreads, g = lane / 4, t = lane % 4;
  const uint32_t drawn =
      kept_quad(seed, threshold, counter + uint64_t{quads} * (2 * t + g % 2) + g / 2);
  uint32_t kept = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    // Row 2t + e % 2 of the mask, column g + e / 2 * 8: quad g / 4 + e / 2 * 2.
    const uint32_t drawer = 2 * (g / 4 + e / 2 * 2) + e % 2;
    const uint32_t quad = __shfl_sync(kFullWarp, drawn, static_cast<int>(4 * drawer + t));
    kept |= (quad >> g % 4 & 1) << e;
  }
  return kept;
}

}  // namespace llmkernels

// Which elements dropout keeps (dropout.h). Four neighbouring columns, a quad, share a counter.
#pragma once

#include "dropout.h"
#include "philox.cuh"

namespace llmkernels {

// Counters of one row: ceil(columns / 4).
__host__ __device__ __forceinline__ uint32_t quads_of_row(int columns) {
  return (static_cast<uint32_t>(columns) + 3) / 4;
}

// The counter of the quad that begins at ``column``, a multiple of 4.
__device__ __forceinline__ uint64_t quad_counter(int64_t row, uint32_t quads, int column) {
  return static_cast<uint64_t>(row) * quads + static_cast<uint32_t>(column) / 4;
}

// Bit j, of four, is set where column j of the quad is kept.
__device__ __forceinline__ uint32_t kept_quad(uint64_t seed, uint32_t threshold, uint64_t counter) {
  const uint4 words = philox_4x32_7(seed, counter);
  return uint32_t{words.x >> 1 >= threshold} | uint32_t{words.y >> 1 >= threshold} << 1 |
         uint32_t{words.z >> 1 >= threshold} << 2 | uint32_t{words.w >> 1 >= threshold} << 3;
}

}  // namespace llmkernels

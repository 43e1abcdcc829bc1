// Dropout (../common/dropout.h) of the columns that a thread owns.
#pragma once

#include "../common/dropout.cuh"
#include "../common/vector.cuh"
#include "layer_norm.h"

namespace llmkernels {

// Bit j is set where column j of the slot is kept. Four adjacent columns share a Philox call; a
// slot of one column takes a call for itself and leaves three words unused.
template <int kColumns>
__device__ __forceinline__ uint32_t kept_columns(const Dropout& dropout, int64_t row, int n,
                                                 const Slot& slot) {
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  const uint64_t row_counter = quad_counter(row, quads_of_row(n), 0);
  uint32_t kept = 0;
#pragma unroll 1
  for (int j = 0; j < kColumns; j += 4) {
    uint32_t quad = kept_quad(seed, dropout.threshold,
                              row_counter + static_cast<uint32_t>((slot.first + j) / 4));
    if constexpr (kColumns == 1) quad >>= slot.first % 4;
    kept |= quad << j;
  }
  return kept;
}

template <int kColumns>
__device__ __forceinline__ void apply_dropout(const Dropout& dropout, int64_t row, int n,
                                              const Slot& slot, float (&values)[kColumns]) {
  const uint32_t kept = kept_columns<kColumns>(dropout, row, n, slot);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) values[j] = kept >> j & 1 ? values[j] * dropout.scale : 0.0f;
}

}  // namespace llmkernels

// The last step of a sum over rows: partial sums, a row of each block that made some, become one
// row.
#pragma once

#include "vector.cuh"

namespace llmkernels {

// A block adds up 8 columns, a 32-byte sector of partial sums, of 32 rows at a time.
inline constexpr int kPartialColumns = 8;
inline constexpr int kPartialLines = 32;
inline constexpr int kPartialThreads = kPartialColumns * kPartialLines;
inline constexpr size_t kPartialSharedBytes = kPartialThreads * sizeof(float);

// total [columns] = sum of the rows of partial, float32 [rows, columns], in a fixed order. Block
// number ``block`` of ceil(columns / kPartialColumns), with all its kPartialThreads threads.
__device__ __forceinline__ void add_partial_rows(const Matrix& partial, int rows,
                                                 const Matrix& total, int columns, int block,
                                                 unsigned char* shared) {
  float (*sums)[kPartialColumns] = reinterpret_cast<float (*)[kPartialColumns]>(shared);
  const int lane = threadIdx.x % kPartialColumns;
  const int line = threadIdx.x / kPartialColumns;
  const Slot slot = slot_of<1>(block, kPartialColumns, lane, columns);

  float sum = 0.0f;
#pragma unroll 4
  for (int row = line; row < rows; row += kPartialLines) {
    float value[1];
    load_values(partial, row, slot, value);
    sum += value[0];
  }
  sums[line][lane] = sum;
  __syncthreads();
#pragma unroll
  for (int half = kPartialLines / 2; half > 0; half /= 2) {
    if (line < half) sums[line][lane] += sums[line + half][lane];
    __syncthreads();
  }
  if (line == 0) store_values<1>(total, 0, slot, {sums[0][lane]});
}

}  // namespace llmkernels

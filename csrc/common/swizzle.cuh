// Tiles in shared memory without bank conflicts.
//
// Memory has 32 banks of 4 bytes, eight chunks of 16 bytes side by side. A phase of an access moves
// 128 bytes and takes one turn if they fall into 32 different banks. Here the chunks of a row are
// exchanged by an exclusive or with a function f of the row, so that each of these meets all eight:
//   (1) ldmatrix, stmatrix, cp.async: one chunk of eight consecutive rows that begin at a multiple
//       of 8, or neighbouring chunks of a row;
//   (2) a lane's 4 bytes of an accumulator of 16 bits, row g, column 2t: as (1);
//   (3) a lane's 8 bytes of an accumulator of 32 bits, row g, column 2t: two neighbouring chunks of
//       rows 0-3 or 4-7;
//   (4) 32-bit elements read down a column, row t or t + 4, column g: two chunks of rows 0-3, 4-7;
//   (5) the same in the order of accumulators, row 2t or 2t + 1: two chunks of rows 0, 2, 4, 6, or
//       of 1, 3, 5, 7.
// In rows of 128 bytes the eight chunks of a row are the eight places. (1) asks that f takes all
// values 0-7 on rows 0-7; (3) to (5) that its upper two bits differ within each of the sets named.
// f(r) = 2 r + 3 [r >= 4] modulo 8, without carries, does all: on rows 0-7 it is 0 2 4 6 3 1 7 5.
// Rows of 64, 32 and 16 bytes share a line of 128 bytes by 2, 4, 8, so f is a function of the line
// with fewer bits, and (1) to (4) hold for 64 bytes, (1) and (2) for all. The same goes for rows
// that are odd multiples of these, as 192 = 3 * 64.
#pragma once

#include "platform.cuh"

namespace llmkernels {

inline constexpr int kChunkBytes = 16;

// The bytes from the start of a tile to chunk ``chunk`` of row ``row``, of rows of kRowBytes bytes.
// The tile begins at a multiple of 128 bytes. A step of 2^n chunks that starts at a multiple of it
// flips one bit of the offset, as far as the row is a power of two: offset(row, chunk ^ step) is
// offset(row, chunk) ^ step * 16.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(kRowBytes % kChunkBytes == 0, "a row is a whole number of 16-byte chunks");
  int f = 0;
  if constexpr (kRowBytes % 128 == 0) {
    f = ((row << 1) & 6) ^ ((row >> 2) & 1) * 3;
  } else if constexpr (kRowBytes % 64 == 0) {
    f = (row & 2) ^ ((row >> 2) & 1);  // lines 0-3 give 0 2 1 3
  } else if constexpr (kRowBytes % 32 == 0) {
    f = (row >> 2) & 1;
  }
  return row * kRowBytes + ((chunk ^ f) * kChunkBytes);
}

// The same for one byte of the row.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_byte(int row, int byte) {
  return swizzled<kRowBytes>(row, byte / kChunkBytes) + byte % kChunkBytes;
}

}  // namespace llmkernels

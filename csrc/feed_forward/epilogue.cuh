// From accumulators to memory: a strip of 16 rows at a time goes through shared memory, and comes
// back as quads, four adjacent columns of a row in one thread. That is one access of 8 or 16 bytes
// to each operand, a warp's side by side, and one counter of dropout. No barrier of the block is in
// it: a warp stages its own strips.
#pragma once

#include "product.cuh"
#include "quad.cuh"

namespace llmkernels {

// A warp's strip of 16 rows in shared memory: float32, a row's first half of columns, then its
// second (product.cuh). Accumulators go there 8 bytes a lane, quads come 16 bytes a lane, both
// without a bank conflict, as swizzle.cuh has it in (3) and (1).
template <typename Tile>
class Strip {
 public:
  static constexpr int kRows = 16;

  // paired: a lane gets of each row the quads of both halves, else one of either.
  __device__ __forceinline__ Strip(ProductStorage<Tile>& storage, bool paired)
      : staging_smem_(storage.staging[threadIdx.x / 32]),
        lanes_(paired ? kQuads / 2 : kQuads),
        row_(row_of(lane_id() / lanes_)),
        quad_(lane_id() % lanes_) {}

  // Rows that a warp has at a time, from a first one on.
  __device__ __forceinline__ int rows_at_once() const { return 32 / lanes_; }
  // This lane's of them.
  __device__ __forceinline__ int row() const { return row_; }
  // Its column of the tile.
  __device__ __forceinline__ int column() const {
    const bool second = quad_ >= kQuads / 2;
    return warp_column<Tile>() + 4 * (second ? quad_ - kQuads / 2 : quad_) +
           (second ? Tile::kBlockN / 2 : 0);
  }
  // The lanes that have the same column: this one, and those a multiple of so many away.
  __device__ __forceinline__ int lanes_of_row() const { return lanes_; }

  // Stages the first strip of the accumulators and moves the others up, so that one copy of what
  // follows serves them all and registers are still addressed by constants.
  __device__ __forceinline__ void stage_first(Accumulators<Tile>& acc) {
    __syncwarp();  // everyone has read the strip before
#pragma unroll
    for (int j = 0; j < Tile::kStripsN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const int byte = (8 * j + accumulator_column(e)) * static_cast<int>(sizeof(float));
        *reinterpret_cast<float2*>(staging_smem_ +
                                   swizzled_byte<kRowBytes>(accumulator_row(e), byte)) =
            make_float2(acc[0][j][e], acc[0][j][e + 1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 1; i < Tile::kStripsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kStripsN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i - 1][j][e] = acc[i][j][e];
      }
    }
  }

  // This lane's quad of the rows from ``first_row`` of the strip on; paired, of either half.
  __device__ __forceinline__ void first(int first_row, Quad& values) const {
    read(first_row + row_, quad_, values);
  }
  __device__ __forceinline__ void second(int first_row, Quad& values) const {
    read(first_row + row_, quad_ + kQuads / 2, values);
  }

 private:
  static constexpr int kRowBytes = Tile::kWarpN * static_cast<int>(sizeof(float));
  static constexpr int kQuads = Tile::kWarpN / 4;

  // Where eight lanes have four quads of two rows, these are rows whose chunks are exchanged by
  // functions that differ in the upper bit, so that the eight fill different banks: 0 and 2, 1 and
  // 3, and so on.
  __device__ __forceinline__ int row_of(int group) const {
    return lanes_ == 4 ? (group & 4) | (group & 1) << 1 | (group >> 1 & 1) : group;
  }

  __device__ __forceinline__ void read(int row, int quad, Quad& values) const {
    const float4 read =
        *reinterpret_cast<const float4*>(staging_smem_ + swizzled<kRowBytes>(row, quad));
    values[0] = read.x, values[1] = read.y, values[2] = read.z, values[3] = read.w;
  }

  unsigned char* staging_smem_;
  int lanes_;
  int row_;
  int quad_;
};

}  // namespace llmkernels

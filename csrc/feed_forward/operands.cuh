// From global to shared memory: the tiles of both operands, a step of K at a time, ahead of the
// product.
//
// Tiles lie in shared memory as their operand does in global memory, rows along k or k by columns,
// in swizzled chunks of 16 bytes (../common/swizzle.cuh). Neighbouring threads copy neighbouring
// chunks of a row, so that a row's 64 bytes along k, or all of its columns, are read together, and
// the chunks of eight threads fill the 32 banks once. The chunks of one thread lie below one
// another.
#pragma once

#include "../common/device.cuh"
#include "../common/swizzle.cuh"
#include "../sm80/cp_async.cuh"
#include "elements.cuh"
#include "feed_forward.h"
#include "tiles.h"

namespace llmkernels {

// All shared memory of a block. Tiles and staging begin at multiples of 128 bytes, as swizzled()
// asks.
template <typename Tile>
struct alignas(128) ProductStorage {
  static constexpr int kStagingBytes = 16 * Tile::kWarpN * static_cast<int>(sizeof(float));

  unsigned char a[Tile::kStages][Tile::kBlockM * Tile::kStepBytes];
  unsigned char b[Tile::kStages][Tile::kBlockN * Tile::kStepBytes];
  unsigned char staging[Tile::kWarpsM * Tile::kWarpsN][kStagingBytes];  // epilogue.cuh
};
static_assert(sizeof(ProductStorage<ProductTiles<Float16>::Large>) == 80 * 1024);
static_assert(sizeof(ProductStorage<ProductTiles<Float16>::Small>) == 48 * 1024);
static_assert(sizeof(ProductStorage<ProductTiles<Tf32>::Large>) == 56 * 1024);

// Where a tile of the result begins.
struct TileOrigin {
  int64_t row;
  int32_t column;
};

// Tiles side by side. Half of the columns of a paired tile are of gate, half of up.
template <typename Tile>
__host__ __device__ __forceinline__ int64_t column_tiles(const Product& p) {
  return p.paired ? divide_up(p.n, Tile::kBlockN / 2) : divide_up(p.n, Tile::kBlockN);
}

template <typename Tile>
__host__ __device__ __forceinline__ int64_t tile_count(const Product& p) {
  return divide_up(p.m, Tile::kBlockM) * column_tiles<Tile>(p);
}

// The origin of tile number ``tile``. Blocks that run at the same time have consecutive ones, which
// go down kGroupRows row tiles before they move on to the next column tile.
template <typename Tile>
__device__ __forceinline__ TileOrigin origin_of(const Product& p, int64_t tile) {
  const int64_t tiles_of_group = kGroupRows * column_tiles<Tile>(p);
  const int64_t group = tile / tiles_of_group;
  const auto within = static_cast<uint32_t>(tile - group * tiles_of_group);
  const int64_t rows_left = divide_up(p.m, Tile::kBlockM) - group * kGroupRows;
  const auto rows = static_cast<uint32_t>(min(int64_t{kGroupRows}, rows_left));
  const uint32_t column = within / rows;
  return {(group * kGroupRows + (within - column * rows)) * Tile::kBlockM,
          static_cast<int32_t>(column) * (p.paired ? Tile::kBlockN / 2 : Tile::kBlockN)};
}

// 16 bytes, of which the first ``valid_bytes``, 0 to 16, are inside the operand; the rest become
// zeros.
template <int kCopyBytes>
__device__ __forceinline__ void copy_chunk(unsigned char* chunk_smem, const char* source_gmem,
                                           int valid_bytes) {
  if constexpr (kCopyBytes == 16) {
    cp_async_cg_16(shared_address(chunk_smem), source_gmem, valid_bytes);
  } else if constexpr (kCopyBytes == 4) {
#pragma unroll
    for (int i = 0; i < 16; i += 4)
      cp_async_ca_4(shared_address(chunk_smem + i), source_gmem + i,
                    max(0, min(4, valid_bytes - i)));
  } else {
    // Elements of 16 bits at an odd one: cp.async has no copy so small.
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      if (i < valid_bytes)
        words[i / 4] |= uint32_t{*reinterpret_cast<const uint16_t*>(source_gmem + i)}
                        << 8 * (i % 4);
    }
    *reinterpret_cast<uint4*>(chunk_smem) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// How a block copies kRows rows of kRowBytes: where a thread's chunks are, ``row``, ``row`` +
// kRowsAtOnce, ..., all of them chunk number ``chunk`` of their row.
template <int kThreads, int kRows, int kRowBytes>
struct ChunksOfThread {
  static constexpr int kChunksOfRow = kRowBytes / kChunkBytes;
  static constexpr int kRowsAtOnce = kThreads / kChunksOfRow;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);  // swizzled() repeats every 8

  __device__ static __forceinline__ int row() {
    return static_cast<int>(threadIdx.x) / kChunksOfRow;
  }
  __device__ static __forceinline__ int chunk() {
    return static_cast<int>(threadIdx.x) % kChunksOfRow;
  }

  // ``source_gmem``: of this thread's first chunk, from which on ``rows_left`` rows and ``bytes``
  // bytes, any number, are inside the operand.
  template <int kCopyBytes>
  __device__ static __forceinline__ void copy(unsigned char* tile_smem, const char* source_gmem,
                                              int64_t row_bytes, int64_t rows_left, int bytes) {
    unsigned char* first_smem = tile_smem + swizzled<kRowBytes>(row(), chunk());
    const int rows = static_cast<int>(min(int64_t{kRows}, rows_left));
    const int valid_bytes = max(0, min(kChunkBytes, bytes));
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce)
      copy_chunk<kCopyBytes>(first_smem + i * kRowBytes, source_gmem + i * row_bytes,
                             i < rows ? valid_bytes : 0);
  }

  // copy_bytes is uniform over the grid.
  __device__ static __forceinline__ void copy(int copy_bytes, unsigned char* tile_smem,
                                              const char* source_gmem, int64_t row_bytes,
                                              int64_t rows_left, int bytes) {
    if (copy_bytes == 16) {
      copy<16>(tile_smem, source_gmem, row_bytes, rows_left, bytes);
    } else if (copy_bytes == 4) {
      copy<4>(tile_smem, source_gmem, row_bytes, rows_left, bytes);
    } else {
      copy<2>(tile_smem, source_gmem, row_bytes, rows_left, bytes);
    }
  }
};

// The steps of all tiles of a block, one after the other, over the stages in turn.
template <typename Tile, typename Element, bool kBAlongK>
class OperandStream {
 public:
  __device__ __forceinline__ OperandStream(const Product& p, ProductStorage<Tile>& storage)
      : p_(p), storage_(storage), tiles_(p.k == 0 ? 0 : tile_count<Tile>(p)), tile_(blockIdx.x) {
    if (tile_ < tiles_) origin_ = origin_of<Tile>(p, tile_);
  }

  // Starts the copies of the next step, if there is one, and closes their group in any case: so
  // many groups back is always the same step.
  __device__ __forceinline__ void start_next() {
    if (tile_ < tiles_) {
      copy_a();
      copy_b();
      k_ += kStepElements;
      if (k_ >= p_.k) {
        k_ = 0;
        tile_ += gridDim.x;
        if (tile_ < tiles_) origin_ = origin_of<Tile>(p_, tile_);
      }
    }
    cp_async_commit_group();
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
  }

 private:
  static constexpr int kBytes = kElementBytes<Element>;
  static constexpr int kStepElements = Tile::kStepBytes / kBytes;
  static constexpr int kHalf = Tile::kBlockN / 2;

  // Rows along k: kRows of them from ``first_row`` on, where ``rows_left`` are left.
  template <int kRows>
  __device__ __forceinline__ void copy_rows(const Matrix& matrix, int copy_bytes,
                                            unsigned char* tile_smem, int64_t first_row,
                                            int64_t rows_left) {
    using Chunks = ChunksOfThread<Tile::kThreads, kRows, Tile::kStepBytes>;
    const int k = k_ + Chunks::chunk() * kChunkElements<Element>;
    const char* source_gmem = static_cast<const char*>(matrix.data) +
                              ((first_row + Chunks::row()) * matrix.row_stride + k) * kBytes;
    Chunks::copy(copy_bytes, tile_smem, source_gmem, matrix.row_stride * kBytes,
                 rows_left - Chunks::row(), elements_bytes(p_.k - k));
  }

  __device__ __forceinline__ void copy_a() {
    copy_rows<Tile::kBlockM>(p_.a, p_.a_copy_bytes, storage_.a[stage_], origin_.row,
                             p_.m - origin_.row);
  }

  __device__ __forceinline__ void copy_b() {
    // Of a paired product the second half of the tile is of the second half of b.
    const int second = p_.paired ? p_.n + origin_.column : origin_.column + kHalf;
    const int left = p_.n - origin_.column;
    const int second_left = p_.paired ? left : left - kHalf;
    unsigned char* tile_smem = storage_.b[stage_];
    if constexpr (kBAlongK) {
      copy_rows<kHalf>(p_.b, p_.b_copy_bytes, tile_smem, origin_.column, left);
      copy_rows<kHalf>(p_.b, p_.b_copy_bytes, tile_smem + kHalf * Tile::kStepBytes, second,
                       second_left);
    } else {
      using Chunks = ChunksOfThread<Tile::kThreads, kStepElements, Tile::kBlockN * kBytes>;
      const int column = Chunks::chunk() * kChunkElements<Element>;
      const bool is_second = column >= kHalf;
      const int within = is_second ? column - kHalf : column;
      const int of_b = (is_second ? second : origin_.column) + within;
      const char* source_gmem = static_cast<const char*>(p_.b.data) +
                                (int64_t{k_ + Chunks::row()} * p_.b.row_stride + of_b) * kBytes;
      Chunks::copy(p_.b_copy_bytes, tile_smem, source_gmem, p_.b.row_stride * kBytes,
                   p_.k - k_ - Chunks::row(),
                   elements_bytes((is_second ? second_left : left) - within));
    }
  }

  // Of a chunk's elements, as far as a chunk needs to know.
  __device__ static __forceinline__ int elements_bytes(int elements) {
    return min(elements, kChunkElements<Element>) * kBytes;
  }

  const Product& p_;
  ProductStorage<Tile>& storage_;
  TileOrigin origin_{};
  int64_t tiles_;  // that have steps at all
  int64_t tile_;   // of which the next step is
  int k_ = 0;      // where it begins
  int stage_ = 0;
};

}  // namespace llmkernels

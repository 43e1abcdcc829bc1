// How a row is laid over threads. The first tile of a table that holds N columns serves.
//
// None of these numbers has been measured on a GPU yet. They follow from an SM's 65536 registers
// (1024 threads of 64, 512 of 128) and from the 32 KiB or so that it must have in flight to keep
// its memory busy. tests/csrc/resources.json holds the registers that each tile takes.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

// Rows of kThreads neighbouring lanes: several to a warp or one, and a block of four warps.
template <int kThreads, int kColumnsPerThread_, int kBlocksPerSm_>
struct WarpRows {
  static constexpr bool kIsBlock = false;
  static constexpr int kLanes = kThreads;  // of one warp that share a row
  static constexpr int kColumnsPerThread = kColumnsPerThread_;
  static constexpr int kMaxThreads = 128;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kRows = kMaxThreads / kThreads;
  static constexpr int kMaxColumns = kThreads * kColumnsPerThread;

  static int block_threads(int) { return kMaxThreads; }
  __device__ static int threads() { return kThreads; }  // of a row
};

// One row for a block of as many whole warps as its columns fill.
template <int kColumnsPerThread_, int kMaxThreads_, int kBlocksPerSm_>
struct BlockRow {
  static constexpr bool kIsBlock = true;
  static constexpr int kLanes = 32;
  static constexpr int kColumnsPerThread = kColumnsPerThread_;
  static constexpr int kMaxThreads = kMaxThreads_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // of kMaxThreads; more of shorter rows
  static constexpr int kRows = 1;
  static constexpr int kMaxColumns = kMaxThreads * kColumnsPerThread;

  static int block_threads(int n) {
    return (n + 32 * kColumnsPerThread - 1) / (32 * kColumnsPerThread) * 32;
  }
  __device__ static int threads() { return static_cast<int>(blockDim.x); }
};

template <typename... Tiles>
struct TileTable {};

// By the columns of one vector: 8 of 16 bits, 4 of 32, or 1 where an operand is not aligned.
// Backward keeps z, dy and two sums of each column, so fewer columns a thread. Longer rows are
// looped over, kLoopColumns in flight a thread.
template <int kVectorColumns>
struct Tiles;

template <>
struct Tiles<8> {
  using Forward = TileTable<WarpRows<8, 8, 10>,      //    64 columns
                            WarpRows<32, 8, 10>,     //   256
                            WarpRows<32, 32, 5>,     //  1024
                            BlockRow<16, 1024, 1>>;  // 16384
  using Backward = TileTable<WarpRows<8, 8, 6>,      //    64
                             WarpRows<32, 8, 6>,     //   256
                             BlockRow<8, 256, 3>,    //  2048
                             BlockRow<32, 512, 1>>;  // 16384, where shared memory holds the sums
  static constexpr int kLoopColumns = 16;
};

template <>
struct Tiles<4> {
  using Forward = TileTable<WarpRows<8, 8, 10>,      //    64 columns
                            WarpRows<32, 8, 10>,     //   256
                            WarpRows<32, 32, 5>,     //  1024
                            BlockRow<16, 1024, 1>>;  // 16384
  using Backward = TileTable<WarpRows<8, 8, 6>,      //    64
                             WarpRows<32, 8, 6>,     //   256
                             BlockRow<8, 256, 3>,    //  2048
                             BlockRow<16, 512, 1>>;  //  8192
  static constexpr int kLoopColumns = 8;
};

template <>
struct Tiles<1> {
  using Forward = TileTable<WarpRows<32, 4, 8>,     //   128 columns
                            BlockRow<4, 1024, 1>>;  //  4096
  using Backward = TileTable<WarpRows<32, 4, 7>,    //   128
                             BlockRow<4, 512, 1>>;  //  2048
  static constexpr int kLoopColumns = 4;
};

inline constexpr int kForwardLoopThreads = 1024;
inline constexpr int kBackwardLoopThreads = 512;

// dweight and dbias of longer rows: a strip of columns a block.
inline constexpr int kStripThreads = 128;
inline constexpr int kStripBlocksPerSm = 8;

// Each partial row costs 16 bytes a column, written and read again; of 16 rows in bf16 that is a
// sixth of their bytes.
inline constexpr int kMinRowsPerPartial = 16;

}  // namespace llmkernels

// What a block makes of a product at a time, by the kind of operands.
//
// None of these numbers has been measured on a GPU yet. A warp that owns 64 x 64 of the result
// reads 4 KiB of shared memory for 32 mma.sync of 16-bit elements, half of what an SM of sm_80 can
// deliver meanwhile; with 128 accumulators a thread two blocks of four warps fill its registers.
// Two of their storages fit into the 164 KiB of sm_80, one into the 100 KiB of sm_120.
// tests/csrc/resources.json holds the registers that each kernel takes.
#pragma once

#include "../common/platform.cuh"

#include "elements.cuh"

namespace llmkernels {

// A block owns kBlockM x kBlockN of the result, shared among kWarpsM x kWarpsN warps, and takes K
// in steps of kStepBytes a row, with kStages - 1 steps of copies under way.
template <int kBlockM_, int kBlockN_, int kStages_, int kBlocksPerSm_>
struct ProductTile {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kWarpsM = 2;
  static constexpr int kWarpsN = 2;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kBlockM / kWarpsM;
  static constexpr int kWarpN = kBlockN / kWarpsN;
  static constexpr int kStepBytes = 64;
  static constexpr int kStripsM = kWarpM / 16;  // accumulators of a warp: kStripsM x kStripsN
  static constexpr int kStripsN = kWarpN / 8;   // of 16 x 8
  static_assert(kWarpM % 16 == 0 && kWarpN % 32 == 0);
};

// Small where large ones would leave multiprocessors without any.
template <typename Element>
struct ProductTiles {
  using Large = ProductTile<128, 128, 4, 2>;
  using Small = ProductTile<64, 64, 5, 3>;
};

// Words of 32 bits halve what a step holds of K, and are rounded in registers.
template <>
struct ProductTiles<Tf32> {
  using Large = ProductTile<128, 64, 4, 2>;
  using Small = ProductTile<64, 64, 5, 2>;
};

// Fragments in two parts: larger tiles would spill.
template <>
struct ProductTiles<Float32> {
  using Large = ProductTile<64, 64, 5, 2>;
  using Small = Large;
};

// Tiles of a column of tiles that are taken before the next column: about as many rows of the one
// operand as columns of the other, which L2 holds together.
inline constexpr int kGroupRows = 8;

// The activation gradient without a product: a block has 64 rows, which make one partial row of
// dbias, of four columns a lane.
inline constexpr int kElementwiseRows = 64;
inline constexpr int kElementwiseColumns = 128;
inline constexpr int kElementwiseWarps = 4;
inline constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid

}  // namespace llmkernels

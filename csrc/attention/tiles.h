// The tiles of every kernel, by head dim. No row of these tables has been timed on a GPU:
// tests/csrc/resources.json holds the registers that each takes. All fit into the 99 KiB of shared
// memory that a block may have on sm_86, sm_89 and sm_120.
#pragma once

#include "../common/platform.cuh"

#include "../common/convert.cuh"

namespace llmkernels::attention {

inline constexpr int kMaxSharedBytes = 99 * 1024;

// A block owns kOwned rows of one operand, 16 kRowTiles a warp, and walks over the other's, kWalked
// at a time. Both head dims are at most kHeadDim.
template <int kHeadDim_, int kWarps_, int kRowTiles_, int kWalked_>
struct Tile {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kOwned = 16 * kRowTiles * kWarps;
  static constexpr int kWalked = kWalked_;
  static_assert(kWalked % 16 == 0, "a step of walked rows is one of fragments of 16");
};

// Forward: a warp of 32 queries uses what it loads of keys and values twice, where registers allow.
// Queries: dq. Keys: dk and dv.
template <typename Element, bool kFeatures>
struct Tiles {
  using Forward64 = Tile<64, 4, 2, 64>;
  using Forward128 = Tile<128, 8, 1, 64>;
  using Forward256 = Tile<256, 4, 1, 32>;
  using Queries64 = Tile<64, 4, 1, 64>;
  using Queries128 = Tile<128, 4, 1, 32>;
  using Queries256 = Tile<256, 4, 1, 16>;
  using Keys64 = Tile<64, 4, 1, 64>;
  using Keys128 = Tile<128, 4, 1, 32>;
  using Keys256 = Tile<256, 4, 1, 16>;
};

// Biases, the soft cap and dropout want registers of their own.
template <typename Element>
struct Tiles<Element, true> : Tiles<Element, false> {
  using Forward64 = Tile<64, 4, 1, 64>;
  using Forward128 = Tile<128, 4, 1, 64>;
  using Queries64 = Tile<64, 4, 1, 32>;
  using Keys64 = Tile<64, 4, 1, 32>;
  using Keys128 = Tile<128, 4, 1, 16>;
};

// Rows of twice the bytes. Of 256 columns 16 rows that are owned and two stages of 16 that are
// walked fill the shared memory: one warp a block.
template <>
struct Tiles<Float32, true> {
  using Forward64 = Tile<64, 4, 1, 32>;
  using Forward128 = Tile<128, 4, 1, 32>;
  using Forward256 = Tile<256, 2, 1, 16>;
  using Queries64 = Tile<64, 4, 1, 32>;
  using Queries128 = Tile<128, 4, 1, 16>;
  using Queries256 = Tile<256, 1, 1, 16>;
  using Keys64 = Tile<64, 4, 1, 32>;
  using Keys128 = Tile<128, 4, 1, 16>;
  using Keys256 = Tile<256, 1, 1, 16>;
};

// dbias: a block's tile of queries, 16 a warp, by keys; any head dim, kBiasColumns of it at a time.
inline constexpr int kBiasWarps = 4;
inline constexpr int kBiasQueries = 16 * kBiasWarps;
inline constexpr int kBiasKeys = 32;
inline constexpr int kBiasColumns = 64;

// delta: rows a block, a warp's quarter each.
inline constexpr int kDeltaLanes = 8;
inline constexpr int kDeltaThreads = 128;

}  // namespace llmkernels::attention

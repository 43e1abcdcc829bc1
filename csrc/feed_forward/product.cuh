// The product of a block's tiles on tensor cores, and the loop over them.
#pragma once

#include <type_traits>

#include "../sm80/fragments.cuh"
#include "../sm80/tf32.cuh"
#include "operands.cuh"

namespace llmkernels {

// A warp's share of a tile, in accumulators of 16 x 8. Its columns are two runs of kWarpN / 2, one
// in either half of the tile, so that a warp has both halves of what a paired tile makes.
template <typename Tile>
using Accumulators = float[Tile::kStripsM][Tile::kStripsN][4];

// The row of the tile at which a warp's share begins, and its column there.
template <typename Tile>
__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / 32 / Tile::kWarpsN * Tile::kWarpM;
}
template <typename Tile>
__device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / 32 % Tile::kWarpsN * (Tile::kWarpN / 2);
}

// Words of a fragment; of Float32 in two parts.
template <typename Element>
struct Fragment {
  uint32_t words[4];
  uint32_t small[4];

  // To what mma.sync takes of this type.
  __device__ __forceinline__ void convert() {
    if constexpr (std::is_same_v<Element, Float32>) split_to_tf32(words, small);
    if constexpr (std::is_same_v<Element, Tf32>) round_to_tf32(words);
  }
};

// d += a b. ``pair``: 0 for the first eight columns of b, 2 for the other.
template <typename Element>
__device__ __forceinline__ void multiply(float (&d)[4], const Fragment<Element>& a,
                                         const Fragment<Element>& b, int pair) {
  if constexpr (std::is_same_v<Element, Float32>) {
    // In a sum of its own that float32 additions collect: what tensor cores cut off of a long sum
    // would cost more than the split leaves. Of infinities the small parts are NaN and their
    // corrections nothing, so that the large parts decide.
    float sum[4] = {};
    mma_m16n8k8_tf32(sum, a.small, b.words[pair], b.words[pair + 1]);
    mma_m16n8k8_tf32(sum, a.words, b.small[pair], b.small[pair + 1]);
    constexpr float kLargest = 3.402823466e+38f;
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] = fminf(fmaxf(sum[e], -kLargest), kLargest);
    mma_m16n8k8_tf32(sum, a.words, b.words[pair], b.words[pair + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] += sum[e];
  } else {
    mma<Element>(d, a.words, b.words[pair], b.words[pair + 1]);
  }
}

// b of 16 columns from column ``n`` of the tile, chunks ``k_chunk`` and the next of K.
template <typename Tile, typename Element, bool kBAlongK>
__device__ __forceinline__ void load_columns(uint32_t (&words)[4], const unsigned char* tile_smem,
                                             int n, int k_chunk) {
  constexpr int kRowBytes = Tile::kBlockN * kElementBytes<Element>;
  const int k = k_chunk * kChunkElements<Element>;
  if constexpr (kBAlongK) {
    load_b<Tile::kStepBytes>(words, shared_address(tile_smem), n, k_chunk);
  } else if constexpr (kElementBytes<Element> == 2) {
    load_b_trans<kRowBytes>(words, shared_address(tile_smem), k, n / kChunkElements<Element>);
  } else {
    load_b_trans_32<kRowBytes, KOrder::kMatrix>(words, tile_smem, k, n);
  }
}

// Adds the product of one step.
template <typename Tile, typename Element, bool kBAlongK>
__device__ __forceinline__ void multiply_step(Accumulators<Tile>& acc, const unsigned char* a_smem,
                                              const unsigned char* b_smem) {
  constexpr int kHalf = Tile::kStripsN / 2;
#pragma unroll
  for (int k_chunk = 0; k_chunk < Tile::kStepBytes / kChunkBytes; k_chunk += 2) {
    Fragment<Element> a[Tile::kStripsM];
#pragma unroll
    for (int i = 0; i < Tile::kStripsM; ++i) {
      load_a<Tile::kStepBytes>(a[i].words, shared_address(a_smem), warp_row<Tile>() + 16 * i,
                               k_chunk);
      a[i].convert();
    }
#pragma unroll
    for (int j = 0; j < Tile::kStripsN; j += 2) {
      const int n = warp_column<Tile>() + (j < kHalf ? 8 * j : Tile::kBlockN / 2 + 8 * (j - kHalf));
      Fragment<Element> b;
      load_columns<Tile, Element, kBAlongK>(b.words, b_smem, n, k_chunk);
      b.convert();
#pragma unroll
      for (int i = 0; i < Tile::kStripsM; ++i) {
        multiply<Element>(acc[i][j], a[i], b, 0);
        multiply<Element>(acc[i][j + 1], a[i], b, 2);
      }
    }
  }
}

// finish(origin, acc) for every tile of a block: blockIdx.x, blockIdx.x + gridDim.x, ... While a
// tile is finished the copies of the next one's first steps are under way.
template <typename Tile, typename Element, bool kBAlongK, typename Finish>
__device__ __forceinline__ void for_each_tile(const Product& p, ProductStorage<Tile>& storage,
                                              Finish finish) {
  constexpr int kStepElements = Tile::kStepBytes / kElementBytes<Element>;
  OperandStream<Tile, Element, kBAlongK> operands(p, storage);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) operands.start_next();
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tile_count<Tile>(p); tile += gridDim.x) {
    Accumulators<Tile> acc = {};
#pragma unroll 1
    for (int k = 0; k < p.k; k += kStepElements) {
      // This thread's copies of the step have landed, after the barrier everyone's; and everyone
      // has multiplied the step before, whose stage the copies that start now go to.
      cp_async_wait_group<Tile::kStages - 2>();
      __syncthreads();
      operands.start_next();
      multiply_step<Tile, Element, kBAlongK>(acc, storage.a[stage], storage.b[stage]);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    finish(origin_of<Tile>(p, tile), acc);
  }
}

}  // namespace llmkernels

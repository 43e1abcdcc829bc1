// Backward: the gradient of hidden, one product, with dropout, the activation's gradient, hidden
// itself and the sums of the bias gradient at its end.
#pragma once

#include "../common/reduce.cuh"
#include "epilogue.cuh"
#include "gradient.cuh"
#include "schedule.cuh"

namespace llmkernels {

// Adds up the lanes that are a multiple of ``lanes`` away, in all of which the sum then is.
__device__ __forceinline__ void add_lanes(BiasSums& sums, int lanes) {
  for (int away = lanes; away < kWarpThreads; away *= 2) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums.gate[j] += __shfl_xor_sync(kFullWarp, sums.gate[j], away);
      sums.up[j] += __shfl_xor_sync(kFullWarp, sums.up[j], away);
    }
  }
}

// The rows that a warp has of a tile make one partial row of dbias, in which no other warp has its
// columns.
template <typename Tile, typename Element, bool kBAlongK>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    linear_activation_backward_kernel(const __grid_constant__ LinearActivationBackward p) {
  LLMKERNELS_SHARED(shared);
  auto& storage = *reinterpret_cast<ProductStorage<Tile>*>(shared);
  for_each_tile<Tile, Element, kBAlongK>(
      p.product, storage, [&](const TileOrigin& origin, Accumulators<Tile>& acc) {
        Strip<Tile> strip(storage, false);
        const int column = origin.column + strip.column();
        const int64_t warp_rows = origin.row + warp_row<Tile>();
        const int64_t lane_rows = warp_rows + strip.row();
        BiasSums sums;
        RowsAhead pre(lane_rows, strip.rows_at_once(),
                      [&](int64_t row) { return load_pre<Element>(p, row, column); });
#pragma unroll 1
        for (int r = 0; r < Tile::kWarpM; r += strip.rows_at_once()) {
          if (r % strip.kRows == 0) strip.stage_first(acc);
          const RawPre raw = pre.next();
          if (lane_rows + r >= p.product.m || column >= p.product.n) continue;
          Quad dhidden;
          strip.first(r % strip.kRows, dhidden);
          finish_backward_quad<Element>(p, lane_rows + r, column, raw, dhidden, sums);
        }
        if (p.dbias_partial.data == nullptr) return;
        add_lanes(sums, strip.lanes_of_row());
        if (strip.row() == 0 && warp_rows < p.product.m)
          store_sums(p, warp_rows / Tile::kWarpM, column, sums);
      });
}

template <typename Element>
cudaError_t linear_activation_backward_of(const LinearActivationBackward& p, const Device& device,
                                          cudaStream_t stream) {
  return with_product_tile<Element>(p.product, device, [&](auto tile) {
    using Tile = decltype(tile);
    const auto kernel = p.product.b_along_k
                            ? linear_activation_backward_kernel<Tile, Element, true>
                            : linear_activation_backward_kernel<Tile, Element, false>;
    return launch(kernel, resident_blocks<Tile>(p.product, device), Tile::kThreads,
                  sizeof(ProductStorage<Tile>), stream, p);
  });
}

}  // namespace llmkernels

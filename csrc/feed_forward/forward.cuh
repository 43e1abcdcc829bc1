// Forward: one product, with bias, activation, gate and dropout at its end.
#pragma once

#include "activation.cuh"
#include "epilogue.cuh"
#include "schedule.cuh"

namespace llmkernels {

// acc + bias as the dtype has it: the pre-activation of columns ``column`` to ``end``, which is
// stored where it is wanted.
template <typename Element>
__device__ __forceinline__ void add_bias_and_round(const LinearActivationForward& p, int64_t row,
                                                   int column, int end, Quad& values) {
  if (p.bias.data != nullptr) {
    Quad bias;
    load_quad<Element>(QuadView<Element>(p.bias, p.is_vector).load(0, column, end), bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] += bias[j];
  }
  const Raw<4> raw = round_quad<Element>(values);
  if (p.pre.data != nullptr) QuadView<Element>(p.pre, p.is_vector).store(row, column, end, raw);
}

// Makes pre and hidden of a quad of the product, paired of one of each half.
template <typename Element>
__device__ __forceinline__ void finish_forward_quad(const LinearActivationForward& p, int64_t row,
                                                    int column, Quad& gate, Quad& up) {
  const int n = p.product.n;
  add_bias_and_round<Element>(p, row, column, n, gate);
  if (p.product.paired) add_bias_and_round<Element>(p, row, n + column, 2 * n, up);
  if (p.hidden.data == nullptr) return;
  Quad hidden;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    hidden[j] = activate(p.activation, gate[j]).value;
    if (p.product.paired) hidden[j] *= up[j];
  }
  if (p.dropout.seed != nullptr) drop(hidden, kept_by(p.dropout, row, column, n), p.dropout.scale);
  QuadView<Element>(p.hidden, p.is_vector).store(row, column, n, round_quad<Element>(hidden));
}

template <typename Tile, typename Element, bool kBAlongK>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    linear_activation_forward_kernel(const __grid_constant__ LinearActivationForward p) {
  LLMKERNELS_SHARED(shared);
  auto& storage = *reinterpret_cast<ProductStorage<Tile>*>(shared);
  for_each_tile<Tile, Element, kBAlongK>(
      p.product, storage, [&](const TileOrigin& origin, Accumulators<Tile>& acc) {
        Strip<Tile> strip(storage, p.product.paired);
        const int column = origin.column + strip.column();
        const int64_t lane_rows = origin.row + warp_row<Tile>() + strip.row();
#pragma unroll 1
        for (int r = 0; r < Tile::kWarpM; r += strip.rows_at_once()) {
          if (r % strip.kRows == 0) strip.stage_first(acc);
          if (lane_rows + r >= p.product.m || column >= p.product.n) continue;
          Quad gate, up;
          strip.first(r % strip.kRows, gate);
          if (p.product.paired) strip.second(r % strip.kRows, up);
          finish_forward_quad<Element>(p, lane_rows + r, column, gate, up);
        }
      });
}

template <typename Element>
cudaError_t linear_activation_forward_of(const LinearActivationForward& p, const Device& device,
                                         cudaStream_t stream) {
  return with_product_tile<Element>(p.product, device, [&](auto tile) {
    using Tile = decltype(tile);
    const auto kernel = p.product.b_along_k
                            ? linear_activation_forward_kernel<Tile, Element, true>
                            : linear_activation_forward_kernel<Tile, Element, false>;
    return launch(kernel, resident_blocks<Tile>(p.product, device), Tile::kThreads,
                  sizeof(ProductStorage<Tile>), stream, p);
  });
}

}  // namespace llmkernels

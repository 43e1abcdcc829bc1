// Backward kernels. Where N fits into registers z, dy and dz are read once, dx and dresidual
// written once: the floor, plus 16 bytes a column for each of the partial rows. Longer rows read z
// and dy a second time for dx, mostly from L2, and a third time for dweight and dbias.
#pragma once

#include "../common/launch.cuh"
#include "dropout.cuh"
#include "plan.cuh"

namespace llmkernels {

// What one row's gradient needs besides its columns.
struct RowStatistics {
  float mean = 0.0f;
  float rstd = 0.0f;
  float mean_g_xhat = 0.0f;
  float mean_g = 0.0f;  // 0 for RMSNorm
};

// Rows past the last own no columns; their statistics are zeros.
__device__ __forceinline__ RowStatistics load_statistics(const LayerNormBackward& p, int64_t row) {
  RowStatistics statistics;
  if (row < p.m) {
    if (p.mean != nullptr) statistics.mean = p.mean[row];
    statistics.rstd = p.rstd[row];
  }
  return statistics;
}

// xhat and dy of the slots of one thread. Every load is issued before the first value is used.
template <typename Element, int kVectors, int kColumns>
__device__ __forceinline__ void load_slots(const LayerNormBackward& p, int64_t row,
                                           const Slot (&slots)[kVectors],
                                           const RowStatistics& statistics,
                                           float (&xhat)[kVectors][kColumns],
                                           float (&dy)[kVectors][kColumns]) {
  const Dtype z_dtype = Element::dtype(p.z.dtype);
  Raw<kColumns> z_raw[kVectors], dy_raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    load(p.z, z_dtype, row, slots[i], z_raw[i]);
    load(p.dy, p.dy.dtype, row, slots[i], dy_raw[i]);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    unpack(z_dtype, z_raw[i], xhat[i]);
    unpack(p.dy.dtype, dy_raw[i], dy[i]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      // Outside the row a mean that is infinite would make it NaN.
      xhat[i][j] = slots[i].inside ? (xhat[i][j] - statistics.mean) * statistics.rstd : 0.0f;
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void make_g(const LayerNormBackward& p, const Slot& slot,
                                       const float (&dy)[kColumns], float (&g)[kColumns]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) g[j] = dy[j];
  if (p.weight.data == nullptr) return;
  float weight[kColumns];
  load_values(p.weight, 0, slot, weight);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) g[j] *= weight[j];
}

// A slot's share of sum(g * xhat) and sum(g).
template <int kColumns>
__device__ __forceinline__ void add_slot(const LayerNormBackward& p, const Slot& slot,
                                         const float (&xhat)[kColumns], const float (&dy)[kColumns],
                                         float (&sums)[2]) {
  float g[kColumns];
  make_g(p, slot, dy, g);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    sums[0] += g[j] * xhat[j];
    sums[1] += g[j];
  }
}

__device__ __forceinline__ void set_means(const LayerNormBackward& p, const float (&sums)[2],
                                          RowStatistics& statistics) {
  const float count = static_cast<float>(p.n);
  statistics.mean_g_xhat = sums[0] / count;
  statistics.mean_g = p.mean == nullptr ? 0.0f : sums[1] / count;
}

template <int kColumns>
__device__ __forceinline__ void write_dx(const LayerNormBackward& p, int64_t row, const Slot& slot,
                                         const float (&xhat)[kColumns], const float (&dy)[kColumns],
                                         const RowStatistics& statistics) {
  float total[kColumns];
  make_g(p, slot, dy, total);
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    total[j] = statistics.rstd * (total[j] - statistics.mean_g - xhat[j] * statistics.mean_g_xhat);
  }
  if (p.dz.data != nullptr) {
    float dz[kColumns];
    load_values(p.dz, row, slot, dz);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) total[j] += dz[j];
  }
  if (p.dresidual.data != nullptr) store_values(p.dresidual, row, slot, total);
  if (p.dropout.seed != nullptr) apply_dropout(p.dropout, row, p.n, slot, total);
  store_values(p.dx, row, slot, total);
}

// A block walks over rows blockIdx.x, blockIdx.x + gridDim.x, ... (times Tile::kRows) and keeps the
// sums of dweight and dbias until the end: one partial row a block, added in the order of the rows.
template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kBlocksPerSm)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackward p) {
  constexpr int kColumns = Element::kColumns;
  constexpr int kVectors = Tile::kColumnsPerThread / kColumns;
  using Sums = ColumnSums<Element, Tile>;
  using Reduction = RowSum<Tile::kLanes, Tile::kIsBlock, 2>;
  LLMKERNELS_SHARED(shared);
  Reduction row_sum(shared);
  Sums dweight(shared + Reduction::kSharedBytes);
  Sums dbias(shared + Reduction::kSharedBytes + Sums::kSharedBytesPerThread * blockDim.x);
  const int threads = Tile::threads();
  const int thread = threadIdx.x % threads;
  const int64_t stride = int64_t{gridDim.x} * Tile::kRows;

#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * Tile::kRows; first < p.m; first += stride) {
    const int64_t row = first + threadIdx.x / threads;
    const int n = row < p.m ? p.n : 0;
    RowStatistics statistics = load_statistics(p, row);
    Slot slots[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) slots[i] = slot_of<kColumns>(i, threads, thread, n);
    float xhat[kVectors][kColumns], dy[kVectors][kColumns];
    load_slots<Element>(p, row, slots, statistics, xhat, dy);

    if (p.dx.data != nullptr) {
      float sums[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kVectors; ++i) add_slot(p, slots[i], xhat[i], dy[i], sums);
      row_sum(sums);
      set_means(p, sums, statistics);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) write_dx(p, row, slots[i], xhat[i], dy[i], statistics);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (p.dbias_partial.data != nullptr) dbias.add(i, dy[i]);
      if (p.dweight_partial.data != nullptr) {
        float gradient[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) gradient[j] = dy[i][j] * xhat[i][j];
        dweight.add(i, gradient);
      }
    }
  }
  if (p.dweight_partial.data != nullptr) dweight.write(p.dweight_partial, p.n);
  if (p.dbias_partial.data != nullptr) dbias.write(p.dbias_partial, p.n);
}

// dx and dresidual of rows too long for registers, a block each: the sums of the whole row, then z
// and dy once more.
template <typename Element>
__global__ void __launch_bounds__(kBackwardLoopThreads)
    layer_norm_input_gradient_kernel(const __grid_constant__ LayerNormBackward p) {
  constexpr int kColumns = Element::kColumns;
  constexpr int kVectors = Tiles<Element::kColumns>::kLoopColumns / kColumns;
  constexpr int kThreads = kBackwardLoopThreads;
  LLMKERNELS_SHARED(shared);
  RowSum<kWarpThreads, true, 2> row_sum(shared);
  const int64_t row = blockIdx.x;
  const int steps =
      static_cast<int>(divide_up(p.n, kThreads * Tiles<Element::kColumns>::kLoopColumns));
  RowStatistics statistics = load_statistics(p, row);
  float sums[2] = {0.0f, 0.0f};

#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Slot slots[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        slots[i] = slot_of<kColumns>(step * kVectors + i, kThreads, threadIdx.x, p.n);
      }
      float xhat[kVectors][kColumns], dy[kVectors][kColumns];
      load_slots<Element>(p, row, slots, statistics, xhat, dy);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (pass == 0) {
          add_slot(p, slots[i], xhat[i], dy[i], sums);
        } else {
          write_dx(p, row, slots[i], xhat[i], dy[i], statistics);
        }
      }
    }
    if (pass == 0) {
      row_sum(sums);
      set_means(p, sums, statistics);
    }
  }
}

// One partial row of dweight and dbias for rows too long for registers: blockIdx.x is a strip of
// columns, blockIdx.y the partial row, which takes rows blockIdx.y, blockIdx.y + gridDim.y, ...
template <typename Element>
__global__ void __launch_bounds__(kStripThreads, kStripBlocksPerSm)
    layer_norm_parameter_gradient_kernel(const __grid_constant__ LayerNormBackward p) {
  constexpr int kColumns = Element::kColumns;
  const Slot slots[1] = {slot_of<kColumns>(blockIdx.x, kStripThreads, threadIdx.x, p.n)};
  float dweight[kColumns] = {}, dbias[kColumns] = {};
  // Four rows' loads in flight.
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < p.m; row += gridDim.y) {
    float xhat[1][kColumns], dy[1][kColumns];
    load_slots<Element>(p, row, slots, load_statistics(p, row), xhat, dy);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      dweight[j] += dy[0][j] * xhat[0][j];
      dbias[j] += dy[0][j];
    }
  }
  if (p.dweight_partial.data != nullptr)
    store_values(p.dweight_partial, blockIdx.y, slots[0], dweight);
  if (p.dbias_partial.data != nullptr) store_values(p.dbias_partial, blockIdx.y, slots[0], dbias);
}

template <typename Element>
cudaError_t launch_looped_backward(const LayerNormBackward& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (p.dx.data != nullptr) {
    error = launch(layer_norm_input_gradient_kernel<Element>, static_cast<unsigned>(p.m),
                   kBackwardLoopThreads, RowSum<kWarpThreads, true, 2>::kSharedBytes, stream, p);
  }
  if (error != cudaSuccess ||
      (p.dweight_partial.data == nullptr && p.dbias_partial.data == nullptr))
    return error;
  const dim3 grid(static_cast<unsigned>(divide_up(p.n, kStripThreads * Element::kColumns)),
                  static_cast<unsigned>(p.partial_rows));
  return launch(layer_norm_parameter_gradient_kernel<Element>, grid, kStripThreads, 0, stream, p);
}

template <typename Element>
cudaError_t layer_norm_backward_of(const LayerNormBackward& p, const Device& device,
                                   cudaStream_t stream) {
  return with_backward_tile<Element>(
      typename Tiles<Element::kColumns>::Backward{}, p.n, device, [&](auto tile) {
        using Tile = decltype(tile);
        if constexpr (std::is_same_v<Tile, std::nullptr_t>) {
          return launch_looped_backward<Element>(p, stream);
        } else {
          return launch(layer_norm_backward_kernel<Element, Tile>,
                        static_cast<unsigned>(p.partial_rows), Tile::block_threads(p.n),
                        backward_shared_bytes<Element, Tile>(p.n), stream, p);
        }
      });
}

}  // namespace llmkernels

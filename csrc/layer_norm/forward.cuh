// Forward kernels. x and residual are read once, z and y written once, the floor of bytes, where a
// row fits into the registers or the shared memory of one block. Longer rows read z (x without a
// residual) a second time.
#pragma once

#include "../common/launch.cuh"
#include "dropout.cuh"
#include "moments.cuh"
#include "plan.cuh"

namespace llmkernels {

// z of the slots of one thread, in registers and, where there is a residual, in memory. All loads
// of x are issued before the first value is used, and two slots of the residual ahead of their use:
// more would not fit into 64 registers.
template <typename Element, int kVectors, int kColumns>
__device__ __forceinline__ void make_z(const LayerNormForward& p, int64_t row,
                                       const Slot (&slots)[kVectors],
                                       float (&z)[kVectors][kColumns]) {
  const Dtype x_dtype = Element::dtype(p.x.dtype);
  Raw<kColumns> x[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) load(p.x, x_dtype, row, slots[i], x[i]);
  if (p.residual.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(x_dtype, x[i], z[i]);
    return;
  }
  constexpr int kAhead = 2;
  Raw<kColumns> residual[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead && i < kVectors; ++i) {
    load(p.residual, p.residual.dtype, row, slots[i], residual[i]);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    unpack(p.residual.dtype, residual[i % kAhead], z[i]);
    if (i + kAhead < kVectors) {
      load(p.residual, p.residual.dtype, row, slots[i + kAhead], residual[i % kAhead]);
    }
    float kept[kColumns];
    unpack(x_dtype, x[i], kept);
    if (p.dropout.seed != nullptr) apply_dropout(p.dropout, row, p.n, slots[i], kept);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) z[i][j] += kept[j];
    // The norm is of z as it is stored.
    Raw<kColumns> rounded;
    pack(p.z.dtype, z[i], rounded);
    store(p.z, row, slots[i], rounded);
    unpack(p.z.dtype, rounded, z[i]);
  }
}

template <int kColumns>
__device__ __forceinline__ void write_y(const LayerNormForward& p, int64_t row, const Slot& slot,
                                        const float (&z)[kColumns], float mean, float mean_low,
                                        float rstd) {
  float y[kColumns];
#pragma unroll
  for (int j = 0; j < kColumns; ++j) y[j] = ((z[j] - mean) - mean_low) * rstd;
  if (p.weight.data != nullptr) {
    float weight[kColumns];
    load_values(p.weight, 0, slot, weight);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) y[j] *= weight[j];
  }
  if (p.bias.data != nullptr) {
    float bias[kColumns];
    load_values(p.bias, 0, slot, bias);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) y[j] += bias[j];
  }
  store_values(p.y, row, slot, y);
}

// A row is held in registers from its load to the store of y.
template <typename Element, typename Tile>
__global__ void __launch_bounds__(Tile::kMaxThreads, Tile::kBlocksPerSm)
    layer_norm_forward_kernel(const __grid_constant__ LayerNormForward p) {
  constexpr int kColumns = Element::kColumns;
  constexpr int kVectors = Tile::kColumnsPerThread / kColumns;
  LLMKERNELS_SHARED(shared);
  RowSum<Tile::kLanes, Tile::kIsBlock, 1> row_sum(shared);
  const int threads = Tile::threads();
  const int thread = threadIdx.x % threads;
  const int64_t row = int64_t{blockIdx.x} * Tile::kRows + threadIdx.x / threads;
  // Rows past the last own no columns, but their lanes take part in the sums.
  const int n = row < p.m ? p.n : 0;

  Slot slots[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) slots[i] = slot_of<kColumns>(i, threads, thread, n);
  float z[kVectors][kColumns];
  make_z<Element>(p, row, slots, z);

  const float count = static_cast<float>(p.n);
  float mean = 0.0f, mean_low = 0.0f;
  if (p.mean != nullptr) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum += z[i][j];
    }
    mean = row_sum(sum) / count;
    // What the rounding of the first sum left out: deviations are small where the mean is large. It
    // stays apart from the mean, whose own rounding would take it back.
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum += slots[i].inside ? z[i][j] - mean : 0.0f;
    }
    mean_low = row_sum(sum) / count;
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float centred = slots[i].inside ? (z[i][j] - mean) - mean_low : 0.0f;
      squares += centred * centred;
    }
  }
  const float rstd = rsqrtf(row_sum(squares) / count + p.eps);
  if (thread == 0 && row < p.m) {
    if (p.mean != nullptr) p.mean[row] = mean + mean_low;
    p.rstd[row] = rstd;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    write_y(p, row, slots[i], z[i], mean, mean_low, rstd);
  }
}

// Rows too long for registers, a block each: statistics piece by piece, then z once more for y. In
// between z lies in shared memory (up to about 113 thousand 16-bit columns on sm_90: still the
// floor's bytes), else it is read again.
template <typename Element>
__global__ void __launch_bounds__(kForwardLoopThreads)
    layer_norm_forward_looped_kernel(const __grid_constant__ LayerNormForward p) {
  constexpr int kColumns = Element::kColumns;
  constexpr int kVectors = Tiles<Element::kColumns>::kLoopColumns / kColumns;
  constexpr int kThreads = kForwardLoopThreads;
  LLMKERNELS_SHARED(shared);
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x;
  const int steps =
      static_cast<int>(divide_up(p.n, kThreads * Tiles<Element::kColumns>::kLoopColumns));
  // A thread reads back the columns that it wrote itself, so no barrier stands between.
  Matrix stored = p.residual.data != nullptr ? p.z : p.x;
  if (p.keeps_row) stored = {shared + kMomentsBytes, 0, stored.dtype};

  Moments moments;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    Slot slots[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      slots[i] = slot_of<kColumns>(step * kVectors + i, kThreads, thread, p.n);
    float z[kVectors][kColumns];
    make_z<Element>(p, row, slots, z);
    if (p.keeps_row) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) store_values(stored, row, slots[i], z[i]);
    }
    moments = merge(moments, moments_of(z, slots, p.mean == nullptr));
  }
  moments = block_merge(moments, shared);
  const float rstd = rsqrtf(moments.squares / static_cast<float>(p.n) + p.eps);
  if (thread == 0) {
    if (p.mean != nullptr) p.mean[row] = moments.mean + moments.mean_low;
    p.rstd[row] = rstd;
  }

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    Slot slots[kVectors];
    Raw<kColumns> raw[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      slots[i] = slot_of<kColumns>(step * kVectors + i, kThreads, thread, p.n);
      load(stored, stored.dtype, row, slots[i], raw[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float z[kColumns];
      unpack(stored.dtype, raw[i], z);
      write_y(p, row, slots[i], z, moments.mean, moments.mean_low, rstd);
    }
  }
}

template <typename Element>
cudaError_t launch_forward(TileTable<>, LayerNormForward p, const Device& device,
                           cudaStream_t stream) {
  const Dtype stored = p.residual.data != nullptr ? p.z.dtype : p.x.dtype;
  const int64_t row_bytes = int64_t{p.n} * bytes_of(stored);
  p.keeps_row = kMomentsBytes + row_bytes <= device.block_shared_bytes;
  return launch(layer_norm_forward_looped_kernel<Element>, static_cast<unsigned>(p.m),
                kForwardLoopThreads, kMomentsBytes + (p.keeps_row ? row_bytes : 0), stream, p);
}

template <typename Element, typename Tile, typename... Longer>
cudaError_t launch_forward(TileTable<Tile, Longer...>, const LayerNormForward& p,
                           const Device& device, cudaStream_t stream) {
  if (p.n > Tile::kMaxColumns)
    return launch_forward<Element>(TileTable<Longer...>{}, p, device, stream);
  return launch(layer_norm_forward_kernel<Element, Tile>,
                static_cast<unsigned>(divide_up(p.m, Tile::kRows)), Tile::block_threads(p.n),
                RowSum<Tile::kLanes, Tile::kIsBlock, 1>::kSharedBytes, stream, p);
}

template <typename Element>
cudaError_t layer_norm_forward_of(const LayerNormForward& p, const Device& device,
                                  cudaStream_t stream) {
  return launch_forward<Element>(typename Tiles<Element::kColumns>::Forward{}, p, device, stream);
}

}  // namespace llmkernels

// Exact statistics of rows that are read in pieces: each piece's own mean and squared deviations,
// merged by the formula of Chan, Golub and LeVeque (Updating formulae and a pairwise algorithm for
// computing sample variances, 1979).
#pragma once

#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace llmkernels {

// The mean is the unevaluated sum mean + mean_low: merges of a row 1e6 + 1e-3 * i then lose nothing
// of its deviations.
struct Moments {
  float count = 0.0f;
  float mean = 0.0f;
  float mean_low = 0.0f;
  float squares = 0.0f;  // sum of (z - mean)^2
};

// a and b in this order: the result's bits depend on it.
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  // An empty side would meet an infinite square of the other as 0 * inf.
  if (b.count == 0.0f) return a;
  if (a.count == 0.0f) return b;
  Moments both;
  both.count = a.count + b.count;
  const float share = b.count / both.count;
  const float delta = (b.mean - a.mean) + (b.mean_low - a.mean_low);
  const float step = a.mean_low + delta * share;
  both.mean = a.mean + step;
  // Two-sum (Knuth): exactly what the rounding of a.mean + step left out.
  const float rounded_step = both.mean - a.mean;
  both.mean_low = (a.mean - (both.mean - rounded_step)) + (step - rounded_step);
  both.squares = a.squares + b.squares + delta * delta * (a.count * share);
  return both;
}

// Of one thread's columns. For RMSNorm the deviations are from 0.
template <int kVectors, int kColumns>
__device__ __forceinline__ Moments moments_of(const float (&z)[kVectors][kColumns],
                                              const Slot (&slots)[kVectors], bool rms) {
  Moments moments;
  int count = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) count += slots[i].inside ? kColumns : 0;
  if (count == 0) return moments;
  moments.count = static_cast<float>(count);
  if (!rms) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum += z[i][j];
    }
    moments.mean = sum / moments.count;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sum += slots[i].inside ? z[i][j] - moments.mean : 0.0f;
    }
    moments.mean_low = sum / moments.count;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float centred = slots[i].inside ? (z[i][j] - moments.mean) - moments.mean_low : 0.0f;
      moments.squares += centred * centred;
    }
  }
  return moments;
}

// What block_merge needs of shared memory: a Moments for each of up to 32 warps.
inline constexpr int kMomentsBytes = kWarpThreads * static_cast<int>(sizeof(Moments));

// Over the block. Every thread gets the same bits.
__device__ __forceinline__ Moments block_merge(Moments moments, unsigned char* shared) {
  const int warp_count = static_cast<int>(blockDim.x) / kWarpThreads;
  const int lane = threadIdx.x % kWarpThreads;
#pragma unroll
  for (int offset = 1; offset < kWarpThreads; offset *= 2) {
    Moments other;
    other.count = __shfl_xor_sync(kFullWarp, moments.count, offset);
    other.mean = __shfl_xor_sync(kFullWarp, moments.mean, offset);
    other.mean_low = __shfl_xor_sync(kFullWarp, moments.mean_low, offset);
    other.squares = __shfl_xor_sync(kFullWarp, moments.squares, offset);
    moments = lane & offset ? merge(other, moments) : merge(moments, other);
  }
  Moments* warps = reinterpret_cast<Moments*>(shared);
  if (lane == 0) warps[threadIdx.x / kWarpThreads] = moments;
  __syncthreads();
  moments = warps[0];
#pragma unroll 1
  for (int warp = 1; warp < warp_count; ++warp) moments = merge(moments, warps[warp]);
  return moments;
}

}  // namespace llmkernels

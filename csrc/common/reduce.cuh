// Sums and maxima over the threads that share a row. The order of the additions is fixed, and every
// thread gets the same bits. Of integers, CUDA's own __reduce_add_sync and its like take one
// instruction.
#pragma once

#include "platform.cuh"

namespace llmkernels {

inline constexpr int kWarpThreads = 32;
inline constexpr uint32_t kFullWarp = 0xffffffffu;

// Over aligned groups of kWidth neighbouring lanes; the whole warp takes part.
template <int kWidth>
__device__ __forceinline__ float warp_sum(float value) {
  static_assert(kWidth <= kWarpThreads && (kWidth & (kWidth - 1)) == 0);
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// NaN is passed over, unless all are NaN.
template <int kWidth>
__device__ __forceinline__ float warp_max(float value) {
  static_assert(kWidth <= kWarpThreads && (kWidth & (kWidth - 1)) == 0);
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Sums of kValues floats over the threads of a row: kLanes neighbouring lanes, or, if kIsBlock, the
// whole block of up to 32 full warps.
template <int kLanes, bool kIsBlock, int kValues>
class RowSum {
 public:
  static constexpr int kSharedBytes =
      kIsBlock ? 2 * kValues * kWarpThreads * static_cast<int>(sizeof(float)) : 0;

  __device__ __forceinline__ explicit RowSum(unsigned char* shared)
      : scratch_(reinterpret_cast<float*>(shared)) {}

  __device__ __forceinline__ void operator()(float (&values)[kValues]) {
#pragma unroll
    for (int k = 0; k < kValues; ++k) values[k] = warp_sum<kLanes>(values[k]);
    if constexpr (kIsBlock) {
      // Two scratch rows in turn: a warp can write one only after the barrier of the sum between,
      // which no warp passes before all have read that row. So one barrier a sum is enough.
      float* turn = scratch_ + odd_ * kValues * kWarpThreads;
      odd_ ^= 1;
      const int lane = threadIdx.x % kWarpThreads;
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < kValues; ++k)
          turn[k * kWarpThreads + threadIdx.x / kWarpThreads] = values[k];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        const float of_warp =
            lane * kWarpThreads < blockDim.x ? turn[k * kWarpThreads + lane] : 0.0f;
        values[k] = warp_sum<kWarpThreads>(of_warp);
      }
    }
  }

  __device__ __forceinline__ float operator()(float value) {
    static_assert(kValues == 1);
    float values[1] = {value};
    (*this)(values);
    return values[0];
  }

 private:
  float* scratch_;
  int odd_ = 0;
};

}  // namespace llmkernels

// What each operation gives where it is used rightly.
#include <cstring>

#include "common/barrier.cuh"
#include "probes.h"
#include "sm80/cp_async.cuh"

namespace llmkernels::probes {

namespace {

constexpr uint32_t kFull = 0xffffffffu;

// output: [8, 32], a row for each shuffle.
__global__ void shuffles(const __grid_constant__ Probe probe) {
  const unsigned lane = threadIdx.x;
  const uint32_t value = probe.input[lane];
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const uint32_t rows[8] = {
      __shfl_sync(kFull, value, 5),       __shfl_sync(kFull, value, 3, 8),
      __shfl_xor_sync(kFull, value, 9),   __shfl_xor_sync(kFull, value, 4, 4),
      __shfl_down_sync(kFull, value, 4),  __shfl_down_sync(kFull, value, 4, 16),
      __shfl_up_sync(kFull, value, 3, 8), __shfl_sync(half, value, static_cast<int>(lane ^ 15)),
  };
  for (int row = 0; row < 8; ++row) probe.output[32 * row + lane] = rows[row];
}

// output: [5, 32]. input: predicates.
__global__ void votes(const __grid_constant__ Probe probe) {
  const unsigned lane = threadIdx.x;
  const int predicate = static_cast<int>(probe.input[lane]);
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  probe.output[lane] = __ballot_sync(kFull, predicate);
  probe.output[32 + lane] = static_cast<uint32_t>(__any_sync(half, predicate));
  probe.output[64 + lane] = static_cast<uint32_t>(__all_sync(half, predicate));
  probe.output[96 + lane] = __ballot_sync(half, predicate);
  if (lane < 7) return;
  probe.output[128 + lane] = __ballot_sync(kFull, 1);  // lanes that have exited are not waited for
}

// Within halves of a warp and within the lanes that have not exited; output: [7, 32].
__global__ void reductions(const __grid_constant__ Probe probe) {
  const unsigned lane = threadIdx.x;
  const uint32_t value = probe.input[lane];
  const uint32_t half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  const uint32_t rows[6] = {
      __reduce_add_sync(half, value),
      __reduce_min_sync(half, value),
      static_cast<uint32_t>(__reduce_min_sync(half, static_cast<int>(value))),
      static_cast<uint32_t>(__reduce_max_sync(half, static_cast<int>(value))),
      __reduce_and_sync(half, value),
      __reduce_xor_sync(half, value),
  };
  for (int row = 0; row < 6; ++row) probe.output[32 * row + lane] = rows[row];
  if (lane < 7) return;
  probe.output[192 + lane] = __reduce_or_sync(kFull, 1u << lane);
}

// 64-bit values and floats go through whole. output: [32] sums of float(lane) and [32] pairs.
__global__ void wide_shuffles(const __grid_constant__ Probe probe) {
  const unsigned lane = threadIdx.x;
  float sum = static_cast<float>(lane);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFull, sum, distance);
  const uint64_t pair = uint64_t{lane} << 32 | (100 + lane);
  const uint64_t next = __shfl_down_sync(kFull, pair, 1);
  probe.output[lane] = __float_as_uint(sum);
  probe.output[32 + lane] = static_cast<uint32_t>(next >> 32) + static_cast<uint32_t>(next);
}

// Reverses count words of each block through shared memory, twice.
__global__ void reverse(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  auto* words = reinterpret_cast<uint32_t*>(smem);
  const unsigned t = threadIdx.x, first = blockIdx.x * blockDim.x;
  words[t] = probe.input[first + t];
  __syncthreads();
  const uint32_t value = words[blockDim.x - 1 - t];
  __syncthreads();
  words[t] = value + 1;
  __syncthreads();
  probe.output[first + t] = words[blockDim.x - 1 - t];
}

// Warp 0 hands words to warp 1 through barrier 1, warp 2 to warp 3 through barrier 2.
__global__ void named_barriers(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  auto* words = reinterpret_cast<uint32_t*>(smem);
  const unsigned t = threadIdx.x, pair = t / 64;
  if (t % 64 < 32) words[t] = probe.input[t];
  bar_sync(1 + pair, 64);
  if (t % 64 >= 32) probe.output[t] = words[t - 32];
}

// Each thread copies its 16 bytes, of which only input[t] bytes are valid; output: [block, 4].
__global__ void zero_fill(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  const unsigned t = threadIdx.x;
  const auto* source = probe.input + blockDim.x + 4 * t;
  cp_async_cg_16(shared_address(smem + 16 * t), source, static_cast<int>(probe.input[t]));
  cp_async_commit_group();
  cp_async_wait_group<0>();
  std::memcpy(probe.output + 4 * t, smem + 16 * t, 16);
}

// Two groups, waited for one after the other; output: [2, block].
__global__ void groups(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  auto* words = reinterpret_cast<uint32_t*>(smem);
  const unsigned t = threadIdx.x, n = blockDim.x;
  for (unsigned group = 0; group < 2; ++group) {
    cp_async_cg_16(shared_address(words + 4 * (group * n + t)), probe.input + 4 * (group * n + t));
    cp_async_commit_group();
  }
  cp_async_wait_group<1>();
  __syncthreads();
  probe.output[t] = words[4 * (n - 1 - t)];
  cp_async_wait_group<0>();
  __syncthreads();
  probe.output[n + t] = words[4 * (n + n - 1 - t)];
}

// What lies in shared memory before a copy has been waited for; output: [block].
__global__ void before_the_wait(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  auto* words = reinterpret_cast<uint32_t*>(smem);
  const unsigned t = threadIdx.x;
  cp_async_cg_16(shared_address(words + 4 * t), probe.input + 4 * t);
  cp_async_commit_group();
  probe.output[t] = words[4 * t];
}

// The order in which the threads pass a barrier: a race that is the point. output: [block].
__global__ void order(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  auto* next = reinterpret_cast<uint32_t*>(smem);
  if (threadIdx.x == 0) *next = 0;
  __syncthreads();
  probe.output[(*next)++] = threadIdx.x;
}

// Blocks and threads of more than one dimension; output: [grid, block].
__global__ void coordinates(const __grid_constant__ Probe probe) {
  const unsigned block_size = blockDim.x * blockDim.y * blockDim.z;
  const unsigned t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  probe.output[b * block_size + t] = threadIdx.x | threadIdx.y << 4 | threadIdx.z << 8 |
                                     blockIdx.x << 12 | blockIdx.y << 16 | blockIdx.z << 20;
}

cudaError_t go_coordinates(const Probe& probe, const Shape&) {
  return launch(coordinates, dim3(2, 3, 2), dim3(4, 2, 3), 0, nullptr, probe);
}

constexpr Feature kFeatures[] = {
    {"shuffles", go<shuffles>},
    {"votes", go<votes>},
    {"reductions", go<reductions>},
    {"wide_shuffles", go<wide_shuffles>},
    {"reverse", go<reverse>},
    {"named_barriers", go<named_barriers>},
    {"zero_fill", go<zero_fill>},
    {"groups", go<groups>},
    {"before_the_wait", go<before_the_wait>},
    {"order", go<order>},
    {"coordinates", go_coordinates},
};

}  // namespace

Launcher find_feature(const char* name) { return find(kFeatures, name); }

}  // namespace llmkernels::probes

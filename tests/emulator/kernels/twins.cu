// Kernels with a bug that the emulator must report, each beside the twin that has it not.
#include "common/barrier.cuh"
#include "probes.h"
#include "sm80/cp_async.cuh"

namespace llmkernels::probes {

namespace {

constexpr uint32_t kFull = 0xffffffffu;

__device__ uint32_t* shared_words() {
  LLMKERNELS_SHARED(smem);
  return reinterpret_cast<uint32_t*>(smem);
}

template <bool kBug>
__global__ void missing_barrier(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x] = probe.input[threadIdx.x];
  if (!kBug) __syncthreads();
  probe.output[threadIdx.x] = words[blockDim.x - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void missing_warp_sync(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x] = probe.input[threadIdx.x];
  if (!kBug) __syncwarp();
  probe.output[threadIdx.x] = words[threadIdx.x ^ 1];
}

// A barrier orders what came before it and nothing that comes after.
template <bool kBug>
__global__ void second_warp_sync_missing(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x] = 0;
  __syncwarp();
  words[threadIdx.x ^ 1] = probe.input[threadIdx.x];
  if (!kBug) __syncwarp();
  probe.output[threadIdx.x] = words[threadIdx.x];
}

// Where threads run in order, all reads come before the write: only their order on paper is
// missing.
template <bool kBug>
__global__ void write_after_reads(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  const unsigned writer = blockDim.x - 2;
  if (threadIdx.x == 0) words[0] = probe.input[0];
  __syncthreads();
  if (threadIdx.x != writer) probe.output[threadIdx.x] = words[0];
  if (!kBug) __syncthreads();
  if (threadIdx.x == writer) words[0] = 1;
}

// A shuffle makes the lanes meet and orders no memory.
template <bool kBug>
__global__ void shuffle_for_a_barrier(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x] = probe.input[threadIdx.x];
  const uint32_t other = __shfl_xor_sync(kFull, probe.input[threadIdx.x], 1);
  if (!kBug) __syncwarp();
  probe.output[threadIdx.x] = words[threadIdx.x ^ 1] + other;
}

template <bool kBug>
__global__ void reused_too_early(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x] = probe.input[threadIdx.x];
  __syncthreads();
  const uint32_t first = words[blockDim.x - 1 - threadIdx.x];
  if (!kBug) __syncthreads();
  words[threadIdx.x] = first + 1;
  __syncthreads();
  probe.output[threadIdx.x] = words[blockDim.x - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void missing_wait(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  cp_async_cg_16(shared_address(words + 4 * threadIdx.x), probe.input + 4 * threadIdx.x);
  cp_async_commit_group();
  if (!kBug) cp_async_wait_group<0>();
  __syncthreads();
  probe.output[threadIdx.x] = words[4 * (blockDim.x - 1 - threadIdx.x)];
}

// Two groups are in flight when the first is read: a wait for all but one is right, for all but two
// too weak.
template <bool kBug>
__global__ void wait_too_weak(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  for (unsigned group = 0; group < 2; ++group) {
    const unsigned word = 4 * (group * blockDim.x + threadIdx.x);
    cp_async_cg_16(shared_address(words + word), probe.input + word);
    cp_async_commit_group();
  }
  cp_async_wait_group<kBug ? 2 : 1>();
  probe.output[threadIdx.x] = words[4 * threadIdx.x];
}

template <bool kBug>
__global__ void copy_overwritten(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  cp_async_cg_16(shared_address(words + 4 * threadIdx.x), probe.input + 4 * threadIdx.x);
  cp_async_commit_group();
  if (kBug) words[4 * threadIdx.x] = 7;
  cp_async_wait_group<0>();
  if (!kBug) words[4 * threadIdx.x] = 7;
  probe.output[threadIdx.x] = words[4 * threadIdx.x];
}

// A stage is filled again while another thread may still read it.
template <bool kBug>
__global__ void copy_over_a_reader(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  uint32_t sum = 0;
  for (unsigned stage = 0; stage < 2; ++stage) {
    if (!kBug) __syncthreads();
    cp_async_cg_16(shared_address(words + 4 * threadIdx.x),
                   probe.input + 4 * (stage * blockDim.x + threadIdx.x));
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();
    sum += words[4 * (blockDim.x - 1 - threadIdx.x)];
  }
  probe.output[threadIdx.x] = sum;
}

template <bool kBug>
__global__ void uninitialised(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  if (!kBug || threadIdx.x + 1 < blockDim.x) words[threadIdx.x] = probe.input[threadIdx.x];
  __syncthreads();
  probe.output[threadIdx.x] = words[blockDim.x - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void read_past_the_end(const __grid_constant__ Probe probe) {
  const int next = static_cast<int>(threadIdx.x) + 1;
  probe.output[threadIdx.x] = next < probe.count + (kBug ? 1 : 0) ? probe.input[next] : 0;
}

template <bool kBug>
__global__ void write_past_the_end(const __grid_constant__ Probe probe) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < probe.count) probe.output[t + (kBug ? 1 : 0)] = probe.input[t];
}

template <bool kBug>
__global__ void copy_past_the_end(const __grid_constant__ Probe probe) {
  const int left = probe.count - 4 * static_cast<int>(threadIdx.x);
  const int valid = kBug ? 16 : 4 * max(0, min(4, left));
  cp_async_cg_16(shared_address(shared_words() + 4 * threadIdx.x), probe.input + 4 * threadIdx.x,
                 valid);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  probe.output[threadIdx.x] = shared_words()[4 * threadIdx.x];
}

template <bool kBug>
__global__ void shared_past_the_end(const __grid_constant__ Probe probe) {
  uint32_t* words = shared_words();
  words[threadIdx.x + (kBug ? 1 : 0)] = probe.input[threadIdx.x];
  probe.output[threadIdx.x] = words[threadIdx.x + (kBug ? 1 : 0)];
}

template <bool kBug>
__global__ void misaligned(const __grid_constant__ Probe probe) {
  const auto* source = reinterpret_cast<const uint4*>(probe.input + (kBug ? 1 : 4));
  *reinterpret_cast<uint4*>(probe.output + 4 * threadIdx.x) = *source;
}

template <bool kBug>
__global__ void divergent_barrier(const __grid_constant__ Probe probe) {
  if (!kBug || threadIdx.x < 16) __syncthreads();
  probe.output[threadIdx.x] = probe.input[threadIdx.x];
}

template <bool kBug>
__global__ void deadlock(const __grid_constant__ Probe probe) {
  const unsigned warp = threadIdx.x / 32;
  const unsigned first = kBug ? 1 + warp : 1;
  bar_sync(first, 64);
  bar_sync(3 - first, 64);
  probe.output[threadIdx.x] = probe.input[threadIdx.x];
}

template <bool kBug>
__global__ void divergent_warp(const __grid_constant__ Probe probe) {
  uint32_t value = probe.input[threadIdx.x];
  if (!kBug || threadIdx.x < 16) {
    value = __shfl_xor_sync(kFull, value, 1);
  } else {
    __syncwarp();
  }
  probe.output[threadIdx.x] = value;
}

template <bool kBug>
__global__ void inactive_lane(const __grid_constant__ Probe probe) {
  probe.output[threadIdx.x] = 0;
  if (threadIdx.x >= 16) return;
  probe.output[threadIdx.x] = __shfl_sync(0xffffu, probe.input[threadIdx.x], kBug ? 20 : 10);
}

template <bool kBug>
__global__ void wrong_mask(const __grid_constant__ Probe probe) {
  const bool upper = threadIdx.x >= 16;
  const uint32_t mask = upper && !kBug ? 0xffff0000u : 0x0000ffffu;
  probe.output[threadIdx.x] = __ballot_sync(mask, static_cast<int>(probe.input[threadIdx.x]));
}

template <bool kBug>
__global__ void global_race(const __grid_constant__ Probe probe) {
  probe.output[threadIdx.x] = probe.input[threadIdx.x];
  if (!kBug) __syncthreads();
  const uint32_t other = probe.output[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  probe.output[threadIdx.x] = other;
}

template <bool kBug>
__global__ void blocks_write_one_word(const __grid_constant__ Probe probe) {
  if (threadIdx.x == 0) probe.output[kBug ? 0 : blockIdx.x] = blockIdx.x;
}

template <bool kBug>
__global__ void block_reads_its_neighbour(const __grid_constant__ Probe probe) {
  if (threadIdx.x != 0) return;
  probe.output[2 * blockIdx.x] = 1;
  const unsigned neighbour = kBug ? (blockIdx.x + 1) % gridDim.x : blockIdx.x;
  probe.output[2 * blockIdx.x + 1] = probe.output[2 * neighbour];
}

template <bool kBug>
__global__ void unmapped(const __grid_constant__ Probe probe) {
  const uint32_t* pointer = kBug ? reinterpret_cast<const uint32_t*>(uintptr_t{4096}) : probe.input;
  probe.output[threadIdx.x] = pointer[threadIdx.x];
}

constexpr Twins kTwins[] = {
    LLMKERNELS_TWINS(missing_barrier),
    LLMKERNELS_TWINS(missing_warp_sync),
    LLMKERNELS_TWINS(second_warp_sync_missing),
    LLMKERNELS_TWINS(write_after_reads),
    LLMKERNELS_TWINS(shuffle_for_a_barrier),
    LLMKERNELS_TWINS(reused_too_early),
    LLMKERNELS_TWINS(missing_wait),
    LLMKERNELS_TWINS(wait_too_weak),
    LLMKERNELS_TWINS(copy_overwritten),
    LLMKERNELS_TWINS(copy_over_a_reader),
    LLMKERNELS_TWINS(uninitialised),
    LLMKERNELS_TWINS(read_past_the_end),
    LLMKERNELS_TWINS(write_past_the_end),
    LLMKERNELS_TWINS(copy_past_the_end),
    LLMKERNELS_TWINS(shared_past_the_end),
    LLMKERNELS_TWINS(misaligned),
    LLMKERNELS_TWINS(divergent_barrier),
    LLMKERNELS_TWINS(deadlock),
    LLMKERNELS_TWINS(divergent_warp),
    LLMKERNELS_TWINS(inactive_lane),
    LLMKERNELS_TWINS(wrong_mask),
    LLMKERNELS_TWINS(global_race),
    LLMKERNELS_TWINS(blocks_write_one_word),
    LLMKERNELS_TWINS(block_reads_its_neighbour),
    LLMKERNELS_TWINS(unmapped),
};

}  // namespace

Launcher find_twin(const char* name, bool bug) { return find(kTwins, name, bug); }

}  // namespace llmkernels::probes

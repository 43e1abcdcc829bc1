// The named barriers of a block, 1 to 15. Barrier 0 is that of __syncthreads.
#pragma once

#include "platform.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::bar_sync;

#else

// Waits until ``threads`` threads, whole warps of them, stand here; orders their memory accesses.
__device__ __forceinline__ void bar_sync(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#endif

}  // namespace llmkernels

// cp.async (PTX ISA, sm_80): copies of 4, 8 or 16 bytes from global to shared memory that the
// issuing thread does not wait for. A thread sees its own copies after wait_group; other threads
// see them after a barrier that follows that wait. Each copies the first source_bytes, 0 to its
// size, and fills the rest with zeros; both addresses are multiples of its size, and with
// source_bytes = 0 the source is not read.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::cp_async_ca_4;
using emulator::cp_async_ca_8;
using emulator::cp_async_cg_16;
using emulator::cp_async_commit_group;
using emulator::cp_async_wait_group;

#else

// ca: cached in L1, too.
__device__ __forceinline__ void cp_async_ca_4(uint32_t destination_smem, const void* source_gmem,
                                              int source_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(destination_smem),
               "l"(__cvta_generic_to_global(source_gmem)), "r"(source_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_ca_8(uint32_t destination_smem, const void* source_gmem,
                                              int source_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(destination_smem),
               "l"(__cvta_generic_to_global(source_gmem)), "r"(source_bytes)
               : "memory");
}

// cg: cached in L2 only, where 16 bytes that are read once belong.
__device__ __forceinline__ void cp_async_cg_16(uint32_t destination_smem, const void* source_gmem,
                                               int source_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination_smem),
               "l"(__cvta_generic_to_global(source_gmem)), "r"(source_bytes)
               : "memory");
}

// Closes the group of the copies issued by this thread since the last one.
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's newest groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

#endif

}  // namespace llmkernels

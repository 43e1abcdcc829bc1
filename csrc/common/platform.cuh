// The two worlds that csrc is compiled in: nvcc, and g++ with LLMKERNELS_EMULATOR (tests/emulator),
// where one fiber runs per CUDA thread. Every device source includes this first and no header of
// CUDA's own.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef LLMKERNELS_EMULATOR

#include "emulator.hpp"

// Shared memory is always dynamic: its size belongs to the launch, and the emulator can poison and
// watch it.
#define LLMKERNELS_SHARED(name) unsigned char* const name = ::llmkernels::emulator::shared_memory()

#else

#include <cuda_runtime.h>

#define LLMKERNELS_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// The bindings are compiled by the host compiler, which knows the runtime's types and no device
// code.
#ifdef __CUDACC__
namespace llmkernels {

// The 32-bit address in the shared window that PTX instructions take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Back from it.
__device__ __forceinline__ unsigned char* shared_pointer(uint32_t address) {
  return static_cast<unsigned char*>(__cvta_shared_to_generic(address));
}

}  // namespace llmkernels
#endif

#endif

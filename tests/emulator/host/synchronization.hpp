// Barriers of a block and of a warp. Both order memory.
#pragma once

#include "language.hpp"

namespace llmkernels::emulator {

// bar.sync: waits until thread_count threads stand at barrier `id` (0 to 15; 0 is __syncthreads').
void bar_sync(unsigned id, unsigned thread_count);
void warp_sync(unsigned mask);

}  // namespace llmkernels::emulator

inline void __syncthreads() {
  ::llmkernels::emulator::bar_sync(0, blockDim.x * blockDim.y * blockDim.z);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::llmkernels::emulator::warp_sync(mask); }

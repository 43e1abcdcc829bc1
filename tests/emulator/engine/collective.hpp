// Operations that the lanes of a warp do together: each lane brings an argument and waits; the last
// one to arrive does the work of all. Shuffles, votes, __syncwarp, ldmatrix and mma.sync are
// collectives.
#pragma once

#include <array>
#include <cstdint>

#include "block.hpp"

namespace llmkernels::emulator {

struct Collective {
  const char* name = nullptr;
  uint32_t mask = 0;     // the lanes named by the callers
  uint32_t arrived = 0;  // a bit for each lane that waits; 0: this entry is free
  bool needs_all = false;
  const void* code = nullptr;  // of one of the callers
  void (*complete)(Collective&) = nullptr;
  std::array<Thread*, kWarpSize> lanes;  // valid where `arrived` has a bit

  bool has(unsigned lane) const { return (arrived >> lane & 1) != 0; }
  template <typename Argument>
  Argument& argument(unsigned lane) const {
    return *static_cast<Argument*>(lanes[lane]->argument);
  }
};

// Joins the collective of this warp with this name and mask. `complete` runs once, when every lane
// of the mask that has not exited is there, and may write to the lanes' arguments.
void join_collective(const char* name, uint32_t mask, void* argument,
                     void (*complete)(Collective&));
// The same for instructions that all 32 lanes must execute (.sync.aligned): a lane that has exited,
// or that the block does not have, ends the launch with a report.
// `code` is the return address in the kernel.
void join_whole_warp(const char* name, void* argument, void (*complete)(Collective&),
                     const void* code);
// An exited lane is not waited for any more.
void collective_thread_exited(const Thread& thread);
void reset_collectives(unsigned thread_count);

}  // namespace llmkernels::emulator

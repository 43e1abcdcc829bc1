// What the race detector remembers of one byte of shared or guarded global memory.
#pragma once

#include <array>
#include <cstdint>

namespace llmkernels::emulator {

// Who acts, and when: an agent of the running block (a thread, or a unit that works beside the
// threads) at a tick of its own clock.
struct Agent {
  uint32_t index;
  uint32_t clock;
};

// Phases number the stretches between barriers of whole blocks, over all blocks and launches: a
// phase tells its block and its launch. 0: nobody.
struct Visit {
  uint32_t phase;
  Agent agent;
};

struct ShadowCell {
  Visit writer;
  std::array<Visit, 3> readers;  // the latest; a fourth that is not ordered after one of them takes
                                 // a place at random
};

}  // namespace llmkernels::emulator

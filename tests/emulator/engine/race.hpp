// Race detection by vector clocks. Each thread carries, for every agent of its block, the last tick
// of that agent's clock that it is ordered after. Barriers and __syncwarp join the clocks of those
// who take part; waiting for an asynchronous unit joins its clock. Two accesses to a byte, one of
// them a write, that no chain of these orders are a race; so are two from different blocks of a
// launch, whatever they do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "block.hpp"
#include "shadow.hpp"

namespace llmkernels::emulator {

extern bool kernels_are_watched;  // this build calls race_access for the kernels' loads and stores

struct Access {
  const void* address;
  size_t bytes;
  bool write;
  const char* what;  // "load", "store", "cp.async"
  const void* code;  // a return address in the kernel
};

void race_begin_launch();
void race_begin_block(unsigned thread_count, size_t shared_bytes);

Agent race_thread_agent();
// The unit that carries the running thread's cp.async copies of its `group`-th group (from 1).
Agent race_copy_agent(uint32_t group);
// The running thread has waited for its groups up to this one.
void race_copies_seen(uint32_t group);

// All of these threads are now ordered after what each of them has done.
void race_synchronize(Thread* const* threads, size_t count);
// Checks an access by `agent` on behalf of the running thread, and remembers it. Ends the launch
// where the access would touch shared memory outside the block's.
void race_access(const Access& access, Agent agent);

}  // namespace llmkernels::emulator

#include "barrier.hpp"

#include <array>

#include "../host/synchronization.hpp"
#include "block.hpp"
#include "race.hpp"

namespace llmkernels::emulator {

namespace {

struct Barrier {
  unsigned expected = 0;
  std::vector<Thread*> arrived;
};
std::array<Barrier, 16> barriers;

constexpr std::array<const char*, 16> kNames = {
    kSyncthreads, "barrier 1",  "barrier 2",  "barrier 3", "barrier 4",  "barrier 5",
    "barrier 6",  "barrier 7",  "barrier 8",  "barrier 9", "barrier 10", "barrier 11",
    "barrier 12", "barrier 13", "barrier 14", "barrier 15"};

}  // namespace

void reset_barriers() {
  for (Barrier& barrier : barriers) barrier.arrived.clear();
}

void bar_sync(unsigned id, unsigned thread_count) {
  if (id >= barriers.size())
    fail("bad barrier", "barrier " + std::to_string(id) + " does not exist: a block has 0 to 15");
  if (id != 0 && thread_count % kWarpSize != 0) {
    fail("bad barrier", std::string(kNames[id]) + " is given " + std::to_string(thread_count) +
                            " threads; expected a multiple of the warp size");
  }
  Barrier& barrier = barriers[id];
  if (barrier.arrived.empty()) barrier.expected = thread_count;
  if (barrier.expected != thread_count) {
    fail("bad barrier", std::string(kNames[id]) + " waits for " + std::to_string(barrier.expected) +
                            " threads, and thread " + std::to_string(current->linear) + " of " +
                            block.name() + " arrives with a count of " +
                            std::to_string(thread_count));
  }
  barrier.arrived.push_back(&block.self());
  if (barrier.arrived.size() < thread_count) {
    suspend(kNames[id]);
    return;
  }
  if (options.race) race_synchronize(barrier.arrived.data(), barrier.arrived.size());
  barrier.arrived.pop_back();
  for (Thread* thread : barrier.arrived) wake(*thread);
  barrier.arrived.clear();
  yield();
}

}  // namespace llmkernels::emulator

// The block that runs: its threads, their scheduling, and how they wait for each other.
//
// All fibers of a block share one OS thread. A thread runs until it waits (suspend), gives way
// (yield) or returns; the scheduler then takes the next one that can run: in order of readiness, or
// at random from a seed. What hardware does on its own (copies in flight; later TMA and wgmma) is
// an agent: it has a number after those of the threads, by which the race detector knows it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../host/language.hpp"
#include "../host/launch.hpp"
#include "context.hpp"

namespace llmkernels::emulator {

struct Options {
  uint64_t seed = 0;
  bool random_schedule = false;
  bool race = false;
  bool bank_conflicts = false;  // of ldmatrix and stmatrix: reported, though nothing is wrong
};
extern Options options;

struct Thread : ThreadIdentity {
  Context context;
  bool exited = false;
  const char* waits_at = nullptr;  // the operation, for reports
  void* argument = nullptr;        // of the collective it waits in
};

struct Block {
  std::vector<Thread> threads;  // never resized while the block runs
  unsigned live = 0;            // threads that have not exited

  Thread& self() { return static_cast<Thread&>(const_cast<ThreadIdentity&>(*current)); }
  std::string name() const;  // "block (1, 0, 0)"
};
extern Block block;

// Prepares the threads of a grid whose shapes are set.
void start_grid(ThreadBody body, const void* argument);
// Runs the block of block_index; false where it ended early, with a report.
bool run_block(size_t shared_bytes);

// To be called on a fiber:
void suspend(const char* where);  // waits until wake() is called for this thread
void yield();                     // lets others run, if the schedule is random
void preempt();                   // yields now and then, so that threads meet between barriers too
// Ends the launch with a report; `code` is a return address in the kernel, where one is known.
[[noreturn]] void fail(const std::string& kind, const std::string& sentence,
                       const void* code = nullptr);

void wake(Thread& thread);

const std::string& last_failure();  // the sentence of the last launch that failed

// A random number below `bound`, from the launch's seed.
uint32_t random_below(uint32_t bound);

// "0-3, 7": the numbers of the threads for which the predicate holds, and no text for none.
template <typename Predicate>
std::string list_threads(Predicate&& predicate) {
  std::string text;
  const auto& threads = block.threads;
  for (size_t first = 0; first < threads.size(); ++first) {
    if (!predicate(threads[first])) continue;
    size_t last = first;
    while (last + 1 < threads.size() && predicate(threads[last + 1])) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(first);
    if (last > first) text += "-" + std::to_string(last);
    first = last;
  }
  return text;
}

}  // namespace llmkernels::emulator

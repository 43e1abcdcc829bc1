#include "block.hpp"

#include <csetjmp>
#include <cstring>
#include <map>
#include <utility>

#include "barrier.hpp"
#include "collective.hpp"
#include "copies.hpp"
#include "faults.hpp"
#include "race.hpp"
#include "random.hpp"
#include "report.hpp"

namespace llmkernels::emulator {

const ThreadIdentity* current = nullptr;
Options options;
Block block;

namespace {

alignas(1024) unsigned char shared_bytes_of_block[kSharedBytesLimit];

constexpr unsigned char kPoison = 0xff;  // a NaN in every floating-point format
constexpr uint32_t kPreemptionPeriod = 16;

Context scheduler;
ThreadBody thread_body;
const void* body_argument;
bool failed;
std::string failure;
Random random_source;

// The threads that can run, in the order in which they became able to.
class ReadyQueue {
 public:
  void reset(size_t capacity) {
    if (ring_.size() < capacity) ring_.resize(capacity);
    head_ = count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void push(Thread* thread) { slot(count_++) = thread; }
  Thread* pop() {
    if (options.random_schedule) std::swap(slot(0), slot(random_below(count_)));
    Thread* thread = slot(0);
    head_ = head_ + 1 == ring_.size() ? 0 : head_ + 1;
    --count_;
    return thread;
  }

 private:
  Thread*& slot(size_t offset) {
    const size_t index = head_ + offset;
    return ring_[index < ring_.size() ? index : index - ring_.size()];
  }
  std::vector<Thread*> ring_;
  size_t head_ = 0;
  uint32_t count_ = 0;
} ready;

// Leaves the running fiber for the next thread that can run; for the scheduler where there is none.
void switch_away(Thread& from) {
  if (ready.empty() || failed) {
    switch_context(from.context, scheduler);
    return;
  }
  Thread* next = ready.pop();
  if (next == &from) return;
  current = next;
  switch_context(from.context, next->context);
}

void run_thread() {
  thread_body(body_argument);
  Thread& thread = block.self();
  thread.exited = true;
  --block.live;
  collective_thread_exited(thread);
  switch_away(thread);
  __builtin_unreachable();
}

void start_block(size_t shared_bytes) {
  const auto thread_count = static_cast<unsigned>(block.threads.size());
  std::memset(shared_bytes_of_block, kPoison, shared_bytes);
  block.live = thread_count;
  ready.reset(thread_count);
  reset_barriers();
  reset_collectives(thread_count);
  reset_copies(thread_count);
  if (options.race) race_begin_block(thread_count, shared_bytes);
  for (Thread& thread : block.threads) {
    thread.exited = false;
    // Stacks lie a power of two apart: offsets spread their tops over the sets of the cache.
    const size_t offset = thread.lane * 128;
    prepare_context(thread.context, fiber_stack(thread.linear), kStackBytes - offset, run_thread);
    ready.push(&thread);
  }
}

void record_failure(const std::string& kind, const std::string& sentence,
                    const void* code = nullptr) {
  failed = true;
  failure = kind + ": " + sentence;
  report(kind, sentence, code);
}

void report_standstill() {
  bool barrier_only = true;
  std::map<std::string, std::string> places;
  for (const Thread& thread : block.threads) {
    if (thread.exited || places.count(thread.waits_at) != 0) continue;
    barrier_only = barrier_only && std::strcmp(thread.waits_at, kSyncthreads) == 0;
    const char* where = thread.waits_at;
    places[where] = list_threads(
        [where](const Thread& t) { return !t.exited && std::strcmp(t.waits_at, where) == 0; });
  }
  std::string sentence = "no thread of " + block.name() + " can go on: ";
  for (const auto& [where, threads] : places)
    sentence += "threads " + threads + " wait at " + where + "; ";
  const std::string exited = list_threads([](const Thread& t) { return t.exited; });
  sentence += exited.empty() ? "none has exited" : "threads " + exited + " have exited";
  record_failure(barrier_only ? "divergent barrier" : "deadlock", sentence);
}

// Runs the started block to its end. A thread that fails, or faults on an address, ends it early.
void finish_block() {
  sigjmp_buf landing;
  if (sigsetjmp(landing, 0) != 0) {
    const std::string who = "thread " + std::to_string(current->linear) + " of " + block.name();
    record_failure("fault", who + " makes " + fault_sentence(), fault_code());
    return;
  }
  set_fault_landing(&landing);
  while (block.live > 0 && !failed) {
    if (ready.empty()) {
      report_standstill();
      return;
    }
    Thread* thread = ready.pop();
    current = thread;
    switch_context(scheduler, thread->context);
  }
}

}  // namespace

unsigned char* shared_memory() { return shared_bytes_of_block; }

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_bytes_of_block);
}

std::string Block::name() const {
  return "block (" + std::to_string(block_index.x) + ", " + std::to_string(block_index.y) + ", " +
         std::to_string(block_index.z) + ")";
}

void suspend(const char* where) {
  Thread& thread = block.self();
  thread.waits_at = where;
  switch_away(thread);
}

void wake(Thread& thread) { ready.push(&thread); }

void yield() {
  if (!options.random_schedule) return;
  Thread& thread = block.self();
  ready.push(&thread);
  switch_away(thread);
}

void preempt() {
  if (options.random_schedule && random_below(kPreemptionPeriod) == 0) yield();
}

void fail(const std::string& kind, const std::string& sentence, const void* code) {
  record_failure(kind, sentence, code);
  switch_context(block.self().context, scheduler);
  __builtin_unreachable();
}

uint32_t random_below(uint32_t bound) {
  return static_cast<uint32_t>(uint64_t{random_source.next()} * bound >> 32);
}

const std::string& last_failure() { return failure; }

void start_grid(ThreadBody body, const void* argument) {
  const unsigned thread_count = block_shape.x * block_shape.y * block_shape.z;
  thread_body = body;
  body_argument = argument;
  failed = false;
  random_source.seed(options.seed);
  block.threads.resize(thread_count);
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % block_shape.x, i / block_shape.x % block_shape.y,
                    i / (block_shape.x * block_shape.y)};
    thread.linear = i;
    thread.warp = i / kWarpSize;
    thread.lane = i % kWarpSize;
  }
}

bool run_block(size_t shared_bytes) {
  start_block(shared_bytes);
  finish_block();
  current = nullptr;
  return !failed;
}

}  // namespace llmkernels::emulator

#include "race.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "heap.hpp"
#include "report.hpp"

namespace llmkernels::emulator {

namespace {

// What the threads of a block know of each other's clocks in the current phase. A barrier of the
// whole block begins a phase, in which every thread knows all that came before and nothing else
// yet: rows are made when warps or parts of the block synchronise. Groups of copies are numbered
// from 1 and known as long as the block runs.
class Clocks {
 public:
  void begin_launch() { first_of_launch_ = phase_ + 1; }

  void begin_block(unsigned thread_count) {
    first_of_block_ = ++phase_;
    threads_ = thread_count;
    if (row_phase_.size() < thread_count) row_phase_.resize(thread_count, 0);
    if (rows_.size() < square()) rows_.resize(square());
    if (copies_used_) std::fill(copies_.begin(), copies_.end(), 0);
    copies_used_ = false;
  }

  void use_copies() {
    if (copies_used_) return;
    copies_used_ = true;
    copies_.assign(square(), 0);
  }

  unsigned threads() const { return threads_; }
  uint32_t phase() const { return phase_; }
  uint32_t first_of_block() const { return first_of_block_; }
  uint32_t first_of_launch() const { return first_of_launch_; }

  uint32_t& copies(unsigned thread, unsigned issuer) {
    return copies_[size_t{threads_} * thread + issuer];
  }

  // The latest tick of the agent that the thread comes after.
  uint32_t known(unsigned thread, uint32_t agent) {
    if (agent >= threads_) return copies(thread, agent - threads_);
    if (row_phase_[thread] == phase_) return row(thread)[agent];
    return agent == thread ? 1 : 0;
  }

  void synchronize(Thread* const* threads, size_t count) {
    if (count == threads_) {
      ++phase_;
    } else {
      for (size_t i = 0; i < count; ++i) make_row(threads[i]->linear);
      join(threads, count, rows_);
      for (size_t i = 0; i < count; ++i) ++row(threads[i]->linear)[threads[i]->linear];
    }
    if (copies_used_) join(threads, count, copies_);
  }

 private:
  size_t square() const { return size_t{threads_} * threads_; }
  uint32_t* row(unsigned thread) { return rows_.data() + size_t{threads_} * thread; }

  void make_row(unsigned thread) {
    if (row_phase_[thread] == phase_) return;
    row_phase_[thread] = phase_;
    std::fill_n(row(thread), threads_, 0);
    row(thread)[thread] = 1;
  }

  // Gives the rows of these threads the maximum of each column.
  void join(Thread* const* threads, size_t count, std::vector<uint32_t>& rows) {
    joined_.assign(threads_, 0);
    for (size_t i = 0; i < count; ++i) {
      const uint32_t* row = rows.data() + size_t{threads_} * threads[i]->linear;
      for (unsigned c = 0; c < threads_; ++c) joined_[c] = std::max(joined_[c], row[c]);
    }
    for (size_t i = 0; i < count; ++i) {
      std::copy_n(joined_.data(), threads_, rows.data() + size_t{threads_} * threads[i]->linear);
    }
  }

  unsigned threads_ = 0;
  uint32_t phase_ = 0, first_of_block_ = 0, first_of_launch_ = 0;
  std::vector<uint32_t> rows_;       // [thread, thread], of the phase row_phase_[thread]
  std::vector<uint32_t> row_phase_;  // [thread]
  bool copies_used_ = false;
  std::vector<uint32_t> copies_;  // [thread, issuer]
  std::vector<uint32_t> joined_;
};

Clocks clocks;
size_t shared_size = 0;

ShadowCell* shared_shadow() {
  // calloc: pages that no block reaches cost nothing.
  static ShadowCell* cells =
      static_cast<ShadowCell*>(std::calloc(kSharedBytesLimit, sizeof(ShadowCell)));
  return cells;
}

// The memory of an access: its cells, and the first phase whose visits still count there.
struct Region {
  ShadowCell* cells;
  uint32_t first_phase;
  std::string (*locate)(const void* address);
};

// Whether the running thread comes after the visit.
bool ordered(const Visit& visit, const Region& region) {
  if (visit.phase < region.first_phase) return true;
  if (visit.phase < clocks.first_of_block()) return false;  // another block of this launch
  if (visit.phase < clocks.phase() && visit.agent.index < clocks.threads()) return true;
  return visit.agent.clock <= clocks.known(current->linear, visit.agent.index);
}

std::string unit_name(uint32_t index) {
  const unsigned threads = clocks.threads();
  if (index < threads) return "thread " + std::to_string(index);
  return "a copy in flight of thread " + std::to_string(index - threads);
}

std::string actor(const Access& access, Agent agent) {
  return std::string(access.what) + " of " + std::to_string(access.bytes) + " bytes by " +
         unit_name(agent.index) + " of " + block.name();
}

std::string locate_shared(const void* address) {
  return "byte " + std::to_string(shared_address(address)) + " of shared memory";
}

std::string locate_global(const void* address) {
  const Buffer* buffer = find_buffer(address, 1);
  const auto offset = static_cast<const unsigned char*>(address) - buffer->begin;
  return "byte " + std::to_string(offset) + " of '" + buffer->label + "'";
}

void report_race(const Access& access, Agent agent, const Visit& other, const char* deed,
                 const std::string& where) {
  const bool blocks = other.phase < clocks.first_of_block();
  const std::string meets = blocks
                                ? "another block's " + std::string(deed)
                                : "a " + std::string(deed) + " by " + unit_name(other.agent.index);
  report(blocks ? "race between blocks" : "race",
         actor(access, agent) + " meets " + meets + " at " + where + ", and nothing orders the two",
         access.code);
}

void remember_reader(ShadowCell& cell, const Region& region, Agent agent) {
  Visit* place = nullptr;
  for (Visit& reader : cell.readers) {
    if (ordered(reader, region)) {
      place = &reader;
      break;
    }
  }
  if (place == nullptr)
    place = &cell.readers[random_below(static_cast<uint32_t>(cell.readers.size()))];
  *place = {clocks.phase(), agent};
}

void visit_byte(const Region& region, size_t index, const unsigned char* byte, const Access& access,
                Agent agent) {
  ShadowCell& cell = region.cells[index];
  if (!ordered(cell.writer, region))
    report_race(access, agent, cell.writer, "write", region.locate(byte));
  if (!access.write) {
    remember_reader(cell, region, agent);
    return;
  }
  for (const Visit& reader : cell.readers) {
    if (!ordered(reader, region)) report_race(access, agent, reader, "read", region.locate(byte));
  }
  cell.writer = {clocks.phase(), agent};
}

void access_shared(const Access& access, Agent agent, size_t offset) {
  const auto* bytes = static_cast<const unsigned char*>(access.address);
  if (offset + access.bytes > shared_size) {
    fail("out of bounds",
         actor(access, agent) + " at byte " + std::to_string(offset) +
             " of shared memory, of which the launch has " + std::to_string(shared_size),
         access.code);
  }
  const Region region{shared_shadow(), clocks.first_of_block(), locate_shared};
  for (size_t i = 0; i < access.bytes; ++i) {
    if (!access.write && region.cells[offset + i].writer.phase < region.first_phase) {
      report(
          "uninitialised",
          actor(access, agent) + " at " + locate_shared(bytes + i) + ", which nobody has written",
          access.code);
    }
    visit_byte(region, offset + i, bytes + i, access, agent);
  }
}

void access_global(const Access& access, Agent agent) {
  const auto* bytes = static_cast<const unsigned char*>(access.address);
  Buffer* buffer = find_buffer(access.address, access.bytes);
  if (buffer == nullptr) {
    report("out of bounds", actor(access, agent) + " begins " + describe_stray(access.address),
           access.code);
    return;
  }
  if (buffer->shadow == nullptr) buffer->shadow = std::make_unique<ShadowCell[]>(buffer->bytes);
  const Region region{buffer->shadow.get(), clocks.first_of_launch(), locate_global};
  const auto offset = static_cast<size_t>(bytes - buffer->begin);
  for (size_t i = 0; i < access.bytes; ++i)
    visit_byte(region, offset + i, bytes + i, access, agent);
}

}  // namespace

void race_begin_launch() { clocks.begin_launch(); }

void race_begin_block(unsigned thread_count, size_t shared_bytes) {
  shared_size = shared_bytes;
  clocks.begin_block(thread_count);
}

Agent race_thread_agent() {
  return {current->linear, clocks.known(current->linear, current->linear)};
}

Agent race_copy_agent(uint32_t group) {
  clocks.use_copies();
  return {clocks.threads() + current->linear, group};
}

void race_copies_seen(uint32_t group) {
  clocks.use_copies();
  clocks.copies(current->linear, current->linear) = group;
}

void race_synchronize(Thread* const* threads, size_t count) { clocks.synchronize(threads, count); }

void race_access(const Access& access, Agent agent) {
  const auto offset =
      static_cast<size_t>(static_cast<const unsigned char*>(access.address) - shared_memory());
  if (offset < kSharedBytesLimit) {
    access_shared(access, agent, offset);
  } else if (in_heap(access.address)) {
    access_global(access, agent);
  }
}

}  // namespace llmkernels::emulator

#include "collective.hpp"

#include <cstdio>
#include <cstring>

#include "../host/synchronization.hpp"
#include "../host/warp.hpp"
#include "race.hpp"
#include "report.hpp"

namespace llmkernels::emulator {

namespace {

struct Warp {
  uint32_t live = 0;  // lanes that have not exited
  uint32_t busy = 0;  // entries with lanes waiting in them
  std::array<Collective, kWarpSize>
      entries;  // a lane waits in one at most, so that one is always free
};
std::vector<Warp> warps;

constexpr uint32_t kAllLanes = ~0u;

std::string hexadecimal(uint32_t value) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", value);
  return text;
}

std::string place(const Thread& thread) {
  return "lane " + std::to_string(thread.lane) + " of warp " + std::to_string(thread.warp) +
         " of " + block.name();
}

// The pending collective with this mask, or a free entry.
Collective& find(Warp& warp, uint32_t mask) {
  for (uint32_t busy = warp.busy; busy != 0; busy &= busy - 1) {
    Collective& candidate = warp.entries[static_cast<size_t>(__builtin_ctz(busy))];
    if (candidate.mask == mask) return candidate;
  }
  return warp.entries[static_cast<size_t>(__builtin_ctz(~warp.busy))];
}

bool is_complete(const Warp& warp, const Collective& collective) {
  return collective.arrived != 0 && collective.arrived == (collective.mask & warp.live);
}

uint32_t bit_of(const Warp& warp, const Collective& collective) {
  return 1u << (&collective - warp.entries.data());
}

void finish(Warp& warp, Collective& collective, const Thread* last) {
  if (collective.needs_all && collective.arrived != kAllLanes) {
    fail("divergent warp",
         std::string(collective.name) + " is executed by the lanes " +
             hexadecimal(collective.arrived) + " of warp " + std::to_string(block.self().warp) +
             " of " + block.name() + " alone; it needs all 32",
         collective.code);
  }
  collective.complete(collective);
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (collective.has(lane) && collective.lanes[lane] != last) wake(*collective.lanes[lane]);
  }
  collective.arrived = 0;
  warp.busy &= ~bit_of(warp, collective);
}

void join(const char* name, uint32_t mask, bool needs_all, void* argument,
          void (*complete)(Collective&), const void* code) {
  Thread& thread = block.self();
  Warp& warp = warps[thread.warp];
  if ((mask >> thread.lane & 1) == 0) {
    fail("bad mask", place(thread) + " calls " + name + " with the mask " + hexadecimal(mask) +
                         ", which does not name it");
  }
  Collective& collective = find(warp, mask);
  if (collective.arrived == 0) {
    collective.name = name;
    collective.mask = mask;
    collective.needs_all = needs_all;
    collective.code = code;
    collective.complete = complete;
    warp.busy |= bit_of(warp, collective);
  } else if (std::strcmp(collective.name, name) != 0) {
    fail("divergent warp",
         place(thread) + " is at " + name + ", the lanes " + hexadecimal(collective.arrived) +
             " of its mask at " + collective.name,
         code);
  }
  collective.arrived |= 1u << thread.lane;
  collective.lanes[thread.lane] = &thread;
  thread.argument = argument;
  if (is_complete(warp, collective)) {
    finish(warp, collective, &thread);
    yield();
  } else {
    suspend(name);
  }
}

struct Shuffle {
  uint64_t value, result;
  int source;
};

struct Vote {
  bool predicate;
  uint32_t result;
};

struct Reduction {
  uint32_t value;
  uint32_t (*combine)(uint32_t, uint32_t);
};

}  // namespace

void reset_collectives(unsigned thread_count) {
  const size_t warp_count = (thread_count + kWarpSize - 1) / kWarpSize;
  if (warps.size() < warp_count) warps.resize(warp_count);
  for (Warp& warp : warps) {
    // Only a launch that failed leaves any behind.
    for (; warp.busy != 0; warp.busy &= warp.busy - 1) {
      warp.entries[static_cast<size_t>(__builtin_ctz(warp.busy))].arrived = 0;
    }
    const auto first = static_cast<unsigned>(&warp - warps.data()) * kWarpSize;
    const unsigned lanes = first < thread_count ? thread_count - first : 0;
    warp.live = lanes >= kWarpSize ? ~0u : (1u << lanes) - 1;
  }
}

void join_collective(const char* name, uint32_t mask, void* argument,
                     void (*complete)(Collective&)) {
  join(name, mask, false, argument, complete, nullptr);
}

void join_whole_warp(const char* name, void* argument, void (*complete)(Collective&),
                     const void* code) {
  join(name, kAllLanes, true, argument, complete, code);
}

void collective_thread_exited(const Thread& thread) {
  Warp& warp = warps[thread.warp];
  warp.live &= ~(1u << thread.lane);
  for (uint32_t busy = warp.busy; busy != 0; busy &= busy - 1) {
    Collective& collective = warp.entries[static_cast<size_t>(__builtin_ctz(busy))];
    if (is_complete(warp, collective)) finish(warp, collective, nullptr);
  }
}

uint64_t warp_shuffle(const char* name, unsigned mask, uint64_t value, int source) {
  if (source == kKeepOwn) source = static_cast<int>(current->lane);
  Shuffle shuffle{value, 0, source};
  join_collective(name, mask, &shuffle, [](Collective& collective) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!collective.has(lane)) continue;
      auto& own = collective.argument<Shuffle>(lane);
      const auto from = static_cast<unsigned>(own.source);
      if (collective.has(from)) {
        own.result = collective.argument<Shuffle>(from).value;
        continue;
      }
      own.result = ~uint64_t{0};
      report("inactive lane", place(*collective.lanes[lane]) + " takes the value of lane " +
                                  std::to_string(from) + " by " + collective.name +
                                  ", which does not take part (mask " +
                                  hexadecimal(collective.mask) + ")");
    }
  });
  return shuffle.result;
}

unsigned warp_ballot(const char* name, unsigned mask, bool predicate) {
  Vote vote{predicate, 0};
  join_collective(name, mask, &vote, [](Collective& collective) {
    uint32_t ballot = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (collective.has(lane) && collective.argument<Vote>(lane).predicate) ballot |= 1u << lane;
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (collective.has(lane)) collective.argument<Vote>(lane).result = ballot;
    }
  });
  return vote.result;
}

uint32_t warp_reduce(const char* name, unsigned mask, uint32_t value,
                     uint32_t (*combine)(uint32_t, uint32_t)) {
  Reduction reduction{value, combine};
  join_collective(name, mask, &reduction, [](Collective& collective) {
    const auto first = static_cast<unsigned>(__builtin_ctz(collective.arrived));
    auto result = collective.argument<Reduction>(first);
    for (unsigned lane = first + 1; lane < kWarpSize; ++lane) {
      if (collective.has(lane))
        result.value = result.combine(result.value, collective.argument<Reduction>(lane).value);
    }
    for (unsigned lane = first; lane < kWarpSize; ++lane) {
      if (collective.has(lane)) collective.argument<Reduction>(lane) = result;
    }
  });
  return reduction.value;
}

void warp_sync(unsigned mask) {
  join_collective("__syncwarp", mask, nullptr, [](Collective& collective) {
    if (!options.race) return;
    std::array<Thread*, kWarpSize> lanes;
    size_t count = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (collective.has(lane)) lanes[count++] = collective.lanes[lane];
    }
    race_synchronize(lanes.data(), count);
  });
}

}  // namespace llmkernels::emulator

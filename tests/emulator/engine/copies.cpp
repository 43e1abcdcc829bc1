#include "copies.hpp"

#include <cstring>
#include <deque>
#include <vector>

#include "../host/cp_async.hpp"
#include "block.hpp"
#include "race.hpp"

namespace llmkernels::emulator {

namespace {

struct Copy {
  unsigned char* destination;
  const void* source;
  int bytes, source_bytes;
  bool moved;
};
using Group = std::vector<Copy>;

struct Copies {
  Group open;                 // issued since the last commit
  std::deque<Group> pending;  // committed and not waited for
  uint32_t retired = 0;       // groups of this block that have been waited for
};
std::vector<Copies> copies_of;
bool used = false;

void move(Copy& copy) {
  const auto valid = static_cast<size_t>(copy.source_bytes);
  if (valid > 0) std::memcpy(copy.destination, copy.source, valid);
  std::memset(copy.destination + valid, 0, static_cast<size_t>(copy.bytes) - valid);
  copy.moved = true;
}

void issue(int bytes, uint32_t destination_smem, const void* source_gmem, int source_bytes,
           const void* code) {
  const auto size = static_cast<uint32_t>(bytes);
  if (destination_smem % size != 0 || reinterpret_cast<uintptr_t>(source_gmem) % size != 0) {
    fail("misaligned",
         "thread " + std::to_string(current->linear) + " of " + block.name() +
             " issues cp.async of " + std::to_string(bytes) +
             " bytes with an address that is not a multiple of it",
         code);
  }
  if (source_bytes < 0 || source_bytes > bytes || destination_smem > kSharedBytesLimit - size) {
    fail("bad copy",
         "thread " + std::to_string(current->linear) + " of " + block.name() +
             " issues cp.async of " + std::to_string(source_bytes) + " bytes to shared address " +
             std::to_string(destination_smem),
         code);
  }
  used = true;
  Copies& copies = copies_of[current->linear];
  Copy copy{shared_memory() + destination_smem, source_gmem, bytes, source_bytes, false};
  if (options.race) {
    const auto group = static_cast<uint32_t>(copies.retired + copies.pending.size() + 1);
    const Agent agent = race_copy_agent(group);
    if (source_bytes > 0) {  // otherwise the source may point anywhere
      race_access({copy.source, static_cast<size_t>(source_bytes), false, "cp.async", code}, agent);
    }
    race_access({copy.destination, size, true, "cp.async", code}, agent);
  }
  // In flight means at any time before the wait: at once or as late as possible shows the most.
  if (options.random_schedule && random_below(2) == 0) move(copy);
  copies.open.push_back(copy);
}

}  // namespace

void reset_copies(unsigned thread_count) {
  if (copies_of.size() < thread_count) copies_of.resize(thread_count);
  if (!used) return;
  for (Copies& copies : copies_of) copies = Copies();
  used = false;
}

void cp_async_ca_4(uint32_t destination_smem, const void* source_gmem, int source_bytes) {
  issue(4, destination_smem, source_gmem, source_bytes, __builtin_return_address(0));
}

void cp_async_ca_8(uint32_t destination_smem, const void* source_gmem, int source_bytes) {
  issue(8, destination_smem, source_gmem, source_bytes, __builtin_return_address(0));
}

void cp_async_cg_16(uint32_t destination_smem, const void* source_gmem, int source_bytes) {
  issue(16, destination_smem, source_gmem, source_bytes, __builtin_return_address(0));
}

void cp_async_commit_group() {
  used = true;
  Copies& copies = copies_of[current->linear];
  copies.pending.push_back(std::move(copies.open));
  copies.open.clear();
}

void cp_async_wait_pending(int pending) {
  Copies& copies = copies_of[current->linear];
  while (copies.pending.size() > static_cast<size_t>(pending)) {
    for (Copy& copy : copies.pending.front()) {
      if (!copy.moved) move(copy);
    }
    copies.pending.pop_front();
    ++copies.retired;
    if (options.race) race_copies_seen(copies.retired);
  }
}

}  // namespace llmkernels::emulator

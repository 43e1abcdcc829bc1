// g++ -fsanitize=thread calls these before each load and store of a kernel unit. They stand in for
// libtsan, which is not linked: here they lead to the emulator's own race detector.
#include <cstdint>

#include "heap.hpp"
#include "race.hpp"

namespace llmkernels::emulator {
bool kernels_are_watched = false;
}

namespace {

using namespace llmkernels::emulator;

bool in_shared(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_memory()) <
         kSharedBytesLimit;
}

// The tests by address come first: host code of a kernel unit and the engine itself may call in
// too, and neither touches these two regions with a thread running.
void on_access(void* address, size_t bytes, size_t alignment, bool write, const void* code) {
  const bool shared = in_shared(address);
  if (!shared && !in_heap(address)) return;
  if (!options.race || current == nullptr) return;
  const char* what = write ? "store" : "load";
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("misaligned",
         std::string(what) + " of " + std::to_string(bytes) + " bytes by thread " +
             std::to_string(current->linear) + " of " + block.name() +
             " at an address that is not a multiple of it",
         code);
  }
  if (shared) preempt();
  race_access({address, bytes, write, what, code}, race_thread_agent());
}

}  // namespace

#define LLMKERNELS_EMULATOR_HOOKS(bytes)                                  \
  void __tsan_read##bytes(void* address) {                                \
    on_access(address, bytes, bytes, false, __builtin_return_address(0)); \
  }                                                                       \
  void __tsan_write##bytes(void* address) {                               \
    on_access(address, bytes, bytes, true, __builtin_return_address(0));  \
  }                                                                       \
  void __tsan_unaligned_read##bytes(void* address) {                      \
    on_access(address, bytes, 1, false, __builtin_return_address(0));     \
  }                                                                       \
  void __tsan_unaligned_write##bytes(void* address) {                     \
    on_access(address, bytes, 1, true, __builtin_return_address(0));      \
  }

extern "C" {

LLMKERNELS_EMULATOR_HOOKS(1)
LLMKERNELS_EMULATOR_HOOKS(2)
LLMKERNELS_EMULATOR_HOOKS(4)
LLMKERNELS_EMULATOR_HOOKS(8)
LLMKERNELS_EMULATOR_HOOKS(16)

void __tsan_read_range(void* address, unsigned long bytes) {
  on_access(address, bytes, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  on_access(address, bytes, 1, true, __builtin_return_address(0));
}

void __tsan_init() { kernels_are_watched = true; }  // a constructor of every instrumented unit
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

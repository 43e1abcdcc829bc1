// Switching between the stacks of fibers.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(LLMKERNELS_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace llmkernels::emulator {

struct Context {
#if defined(__x86_64__) && !defined(LLMKERNELS_EMULATOR_UCONTEXT)
  void* stack_pointer;
#else
  ucontext_t state;
#endif
};

// Makes `context` call `entry`, which never returns, on the stack that ends at `stack` + `bytes`,
// when it is switched to.
void prepare_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)());
// Saves the running context in `from` and goes on with `to`.
void switch_context(Context& from, Context& to);

// The stack of fiber `index`: mapped once, used by every later launch. A guard page lies below it.
unsigned char* fiber_stack(size_t index);
constexpr size_t kStackBytes = 64 * 1024;

}  // namespace llmkernels::emulator

#include "context.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

namespace llmkernels::emulator {

#if defined(__x86_64__) && !defined(LLMKERNELS_EMULATOR_UCONTEXT)

// Callee-saved registers of the System V ABI go on the old stack and come from the new one.
extern "C" void llmkernels_emulator_switch(void** saved, void* loaded);
asm(R"(
.text
.hidden llmkernels_emulator_switch
.globl llmkernels_emulator_switch
.type llmkernels_emulator_switch, @function
llmkernels_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size llmkernels_emulator_switch, .-llmkernels_emulator_switch
)");

void prepare_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  constexpr int kSavedRegisters = 6;
  auto** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // where entry's return address would be: keeps the ABI's alignment at its
                     // first instruction
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  llmkernels_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

unsigned char* fiber_stack(size_t index) {
  constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= index) {
    void* mapping = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    auto* base = static_cast<unsigned char*>(mapping);
    mprotect(base, kGuardBytes, PROT_NONE);
    stacks.push_back(base + kGuardBytes);
  }
  return stacks[index];
}

}  // namespace llmkernels::emulator

#include "faults.hpp"

#include <ucontext.h>

#include <cstdint>
#include <sstream>

namespace llmkernels::emulator {

namespace {

alignas(16) unsigned char handler_stack[64 * 1024];
sigjmp_buf* fault_landing = nullptr;
const void* address = nullptr;
const void* code = nullptr;

void on_fault(int, siginfo_t* information, void* context) {
  address = information->si_addr;
  code = nullptr;
#if defined(__x86_64__)
  const auto instruction = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP];
  code = reinterpret_cast<const void*>(instruction + 1);  // as a return address would be
#else
  static_cast<void>(context);
#endif
  siglongjmp(*fault_landing, 1);
}

}  // namespace

FaultHandlers::FaultHandlers() {
  stack_t own{};
  own.ss_sp = handler_stack;
  own.ss_size = sizeof handler_stack;
  sigaltstack(&own, &signal_stack_);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &segmentation_);
  sigaction(SIGBUS, &action, &bus_);
}

FaultHandlers::~FaultHandlers() {
  sigaction(SIGSEGV, &segmentation_, nullptr);
  sigaction(SIGBUS, &bus_, nullptr);
  sigaltstack(&signal_stack_, nullptr);
}

void set_fault_landing(sigjmp_buf* landing) { fault_landing = landing; }

std::string fault_sentence() {
  std::ostringstream sentence;
  sentence << "an access that this machine refuses: ";
  if (address == nullptr) {
    sentence << "a null pointer or a misaligned vector";
  } else {
    sentence << "address " << address << " is not mapped";
  }
  return sentence.str();
}

const void* fault_code() { return code; }

}  // namespace llmkernels::emulator

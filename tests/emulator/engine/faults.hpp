// A kernel that touches unmapped or misaligned memory raises a signal: the launch ends with a
// report, the process lives.
#pragma once

#include <csetjmp>
#include <csignal>
#include <string>

namespace llmkernels::emulator {

// Takes SIGSEGV and SIGBUS over for the life of a launch.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;

 private:
  struct sigaction segmentation_, bus_;
  stack_t signal_stack_;
};

// Where a fault of the running fiber jumps to.
void set_fault_landing(sigjmp_buf* landing);
// What the last fault was, and the instruction that raised it where the host tells.
std::string fault_sentence();
const void* fault_code();

}  // namespace llmkernels::emulator

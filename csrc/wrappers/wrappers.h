// Every instruction that csrc wraps or takes from CUDA by name, each in a kernel of its own that
// runs it on given operands: `llmkernels doctor --wrappers` compares what comes out with what the
// manual says, on a GPU and through the emulator.
#pragma once

#include "../common/platform.cuh"

namespace llmkernels {

struct Wrapper {
  const char* name;  // of the function
  int threads;       // of the one block
  int input_words;   // of each thread
  int output_words;  // of each thread
};

// The table.
int wrapper_count();
const Wrapper& wrapper(int row);

// Runs the wrapper of this name on the current device. input: [threads, input_words], at a multiple
// of 16 bytes; output: [threads, output_words]. cudaErrorInvalidValue where no row has the name.
cudaError_t run_wrapper(const char* name, const uint32_t* input, uint32_t* output,
                        cudaStream_t stream);

}  // namespace llmkernels

// Tiny kernels that show one feature each, or hold one bug beside the right twin.
#pragma once

#include "common/platform.cuh"

namespace llmkernels::probes {

struct Probe {
  const uint32_t* input;  // [count]
  uint32_t* output;       // [count], or as the kernel says
  int count;              // threads of a block, unless the kernel says otherwise
};

struct Shape {
  unsigned grid, block;
  size_t shared_bytes;
};

using Launcher = cudaError_t (*)(const Probe& probe, const Shape& shape);

// The launcher of a kernel; `bug` chooses the twin that has it. Null for an unknown name.
Launcher find_feature(const char* name);
Launcher find_fragment_feature(const char* name);
Launcher find_twin(const char* name, bool bug);
Launcher find_matrix_twin(const char* name, bool bug);

}  // namespace llmkernels::probes

// Tiny kernels that show one feature each, or hold one bug beside the right twin.
#pragma once

#include <cstring>

#include "common/launch.cuh"

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

template <void (*kernel)(Probe)>
cudaError_t go(const Probe& probe, const Shape& shape) {
  return launch(kernel, shape.grid, shape.block, shape.shared_bytes, nullptr, probe);
}

struct Feature {
  const char* name;
  Launcher launcher;
};

struct Twins {
  const char* name;
  Launcher right, bug;
};

#define LLMKERNELS_TWINS(kernel) {#kernel, go<kernel<false>>, go<kernel<true>>}

template <size_t kCount>
Launcher find(const Feature (&features)[kCount], const char* name) {
  for (const Feature& feature : features) {
    if (std::strcmp(feature.name, name) == 0) return feature.launcher;
  }
  return nullptr;
}

template <size_t kCount>
Launcher find(const Twins (&pairs)[kCount], const char* name, bool bug) {
  for (const Twins& twins : pairs) {
    if (std::strcmp(twins.name, name) == 0) return bug ? twins.bug : twins.right;
  }
  return nullptr;
}

// The launcher of a kernel; `bug` chooses the twin that has it. Null for a name that the file does
// not have.
Launcher find_feature(const char* name);
Launcher find_fragment_feature(const char* name);
Launcher find_twin(const char* name, bool bug);
Launcher find_matrix_twin(const char* name, bool bug);

}  // namespace llmkernels::probes

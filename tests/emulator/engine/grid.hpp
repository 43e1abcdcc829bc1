// Launches: the blocks of a grid, one after the other.
#pragma once

#include <set>

namespace llmkernels::emulator {

const std::set<const void*>& launched_kernels();

}  // namespace llmkernels::emulator

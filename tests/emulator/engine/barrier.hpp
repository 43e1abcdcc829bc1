// The sixteen barriers of a block.
#pragma once

namespace llmkernels::emulator {

inline constexpr char kSyncthreads[] = "__syncthreads";

void reset_barriers();

}  // namespace llmkernels::emulator

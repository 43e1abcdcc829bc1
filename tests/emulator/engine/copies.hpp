// cp.async: the copies of each thread, in flight or in groups.
#pragma once

namespace llmkernels::emulator {

void reset_copies(unsigned thread_count);

}  // namespace llmkernels::emulator

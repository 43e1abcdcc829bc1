// What the emulator has found wrong, as sentences. The first word or words name the kind: "race",
// "out of bounds", ...
#pragma once

#include <string>
#include <vector>

namespace llmkernels::emulator {

// Adds a sentence. `code` is the address of the instruction at fault: one sentence is kept for each
// kind and place.
void report(const std::string& kind, const std::string& sentence, const void* code = nullptr);
// The sentences since the last clear_report(), with source lines where the debug information gives
// them.
std::vector<std::string> report_lines();
void clear_report();

}  // namespace llmkernels::emulator

#include "report.hpp"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <set>
#include <sstream>
#include <utility>

namespace llmkernels::emulator {

namespace {

struct Entry {
  std::string text;
  const void* code;
};

constexpr size_t kMaximumEntries = 64;
std::vector<Entry> entries;
std::set<std::pair<std::string, const void*>> places;

// "row.cuh:12" of an instruction of this shared object, and behind it the lines that it was inlined
// into, "row.cuh:12 < kernel.cuh:34"; empty if addr2line or the debug information is missing.
std::string source_lines(const void* code) {
  Dl_info object;
  if (code == nullptr || dladdr(code, &object) == 0) return {};
  // A return address belongs to the call before it.
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(object.dli_fbase) - 1;
  std::ostringstream command;
  command << "addr2line --inlines --basenames --exe='" << object.dli_fname << "' 0x" << std::hex
          << offset << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return {};
  std::string text;
  for (char line[256]; fgets(line, sizeof line, pipe) != nullptr;) {
    const std::string place(line, std::strcspn(line, " \n"));
    if (place.find('?') != std::string::npos || place.compare(0, 10, "launch.hpp") == 0) break;
    text += (text.empty() ? "" : " < ") + place;
  }
  pclose(pipe);
  return text;
}

}  // namespace

void report(const std::string& kind, const std::string& sentence, const void* code) {
  if (entries.size() == kMaximumEntries) return;
  if (code != nullptr && !places.insert({kind, code}).second) return;
  entries.push_back({kind + ": " + sentence, code});
}

std::vector<std::string> report_lines() {
  std::vector<std::string> lines;
  for (const Entry& entry : entries) {
    const std::string line = source_lines(entry.code);
    lines.push_back(line.empty() ? entry.text : entry.text + " [" + line + "]");
  }
  return lines;
}

void clear_report() {
  entries.clear();
  places.clear();
}

}  // namespace llmkernels::emulator

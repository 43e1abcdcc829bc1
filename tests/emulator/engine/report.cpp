#include "report.hpp"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
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

// "row.cuh:12" of an instruction of this shared object, empty if addr2line or the debug information
// is missing.
std::string source_line(const void* code) {
  Dl_info object;
  if (code == nullptr || dladdr(code, &object) == 0) return {};
  // A return address belongs to the call before it.
  const auto offset =
      reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(object.dli_fbase) - 1;
  std::ostringstream command;
  command << "addr2line --basenames --exe='" << object.dli_fname << "' 0x" << std::hex << offset
          << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return {};
  char line[256] = "";
  const bool read = fgets(line, sizeof line, pipe) != nullptr;
  pclose(pipe);
  std::string text = read ? line : "";
  text = text.substr(0, text.find_first_of(" \n"));
  return text.find('?') == std::string::npos ? text : std::string();
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
    const std::string line = source_line(entry.code);
    lines.push_back(line.empty() ? entry.text : entry.text + " [" + line + "]");
  }
  return lines;
}

void clear_report() {
  entries.clear();
  places.clear();
}

}  // namespace llmkernels::emulator

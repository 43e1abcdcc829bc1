#include "heap.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <new>

#include "report.hpp"

namespace llmkernels::emulator {

namespace {

constexpr size_t kHeapBytes = size_t{1} << 35;  // of addresses: pages are used when touched
constexpr size_t kPageBytes = 4096;
constexpr uint16_t kCanary =
    0xfff1;  // a NaN as bfloat16, float16 and, twice, float32, and no value that poison leaves

unsigned char* base = nullptr;
unsigned char* top = nullptr;
std::map<const unsigned char*, Buffer> buffers;

size_t round_up(size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }

unsigned char* first_guard(const Buffer& buffer) {
  const auto offset = static_cast<size_t>(buffer.begin - base) % kPageBytes;
  return buffer.begin - offset - kPageBytes;
}
unsigned char* last_guard_end(const Buffer& buffer) {
  return base + round_up(static_cast<size_t>(buffer.begin + buffer.bytes - base)) + kPageBytes;
}

void fill_canary(unsigned char* begin, unsigned char* end) {
  for (unsigned char* byte = begin; byte < end; ++byte) {
    *byte = static_cast<unsigned char>(kCanary >> 8 * (reinterpret_cast<uintptr_t>(byte) % 2));
  }
}

void check_canary(const Buffer& buffer, unsigned char* begin, unsigned char* end) {
  unsigned char* changed = std::find_if(begin, end, [](const unsigned char& byte) {
    return byte !=
           static_cast<unsigned char>(kCanary >> 8 * (reinterpret_cast<uintptr_t>(&byte) % 2));
  });
  if (changed != end)
    report("out of bounds", "something wrote " + describe_stray(changed) + " (found when '" +
                                buffer.label + "' was freed)");
}

}  // namespace

Buffer& allocate_guarded(size_t bytes, size_t offset, const std::string& label) {
  if (base == nullptr) {
    void* mapping = mmap(nullptr, kHeapBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    base = top = static_cast<unsigned char*>(mapping);
  }
  const size_t span = kPageBytes + round_up(offset + bytes) + kPageBytes;
  if (offset >= kPageBytes || bytes > kHeapBytes ||
      static_cast<size_t>(base + kHeapBytes - top) < span) {
    throw std::bad_alloc();
  }
  unsigned char* begin = top + kPageBytes + offset;
  fill_canary(top, begin);
  std::memset(begin, 0xff, bytes);
  fill_canary(begin + bytes, top + span);
  top += span;
  return buffers.emplace(begin, Buffer{begin, bytes, label, nullptr}).first->second;
}

void free_guarded(const unsigned char* begin) {
  const auto entry = buffers.find(begin);
  if (entry == buffers.end()) return;
  const Buffer& buffer = entry->second;
  unsigned char* first = first_guard(buffer);
  unsigned char* last = last_guard_end(buffer);
  check_canary(buffer, first, buffer.begin);
  check_canary(buffer, buffer.begin + buffer.bytes, last);
  madvise(first, static_cast<size_t>(last - first), MADV_DONTNEED);
  buffers.erase(entry);
  // Addresses are not used again while any buffer lives, so that a stale pointer is seen.
  if (buffers.empty()) top = base;
}

bool in_heap(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(base) < kHeapBytes &&
         base != nullptr;
}

Buffer* find_buffer(const void* address, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(address);
  auto entry = buffers.upper_bound(byte);
  if (entry == buffers.begin()) return nullptr;
  Buffer& buffer = (--entry)->second;
  const auto offset = static_cast<size_t>(byte - buffer.begin);
  return offset <= buffer.bytes && bytes <= buffer.bytes - offset ? &buffer : nullptr;
}

std::string describe_stray(const void* address) {
  const auto* byte = static_cast<const unsigned char*>(address);
  const auto of = [](const Buffer& buffer) {
    return " of the " + std::to_string(buffer.bytes) + " bytes of '" + buffer.label + "'";
  };
  const auto after = buffers.upper_bound(byte);
  if (after != buffers.begin()) {
    const Buffer& buffer = std::prev(after)->second;
    if (byte < buffer.begin + buffer.bytes) {
      return std::to_string(buffer.begin + buffer.bytes - byte) + " bytes before the end" +
             of(buffer);
    }
    if (byte < last_guard_end(buffer)) {
      return std::to_string(byte - buffer.begin - static_cast<ptrdiff_t>(buffer.bytes)) +
             " bytes past the end" + of(buffer);
    }
  }
  if (after != buffers.end() && byte >= first_guard(after->second)) {
    return std::to_string(after->second.begin - byte) + " bytes before the start" +
           of(after->second);
  }
  return "in memory that no buffer holds any more";
}

}  // namespace llmkernels::emulator

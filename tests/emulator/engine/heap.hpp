// Global memory with guards: each buffer lies between pages that hold a canary, so that a kernel's
// accesses can be told to be inside it or not.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "shadow.hpp"

namespace llmkernels::emulator {

struct Buffer {
  unsigned char* begin;
  size_t bytes;
  std::string label;
  std::unique_ptr<ShadowCell[]>
      shadow;  // a cell for each byte, made by the first access of a race-checking launch
};

// A buffer of `bytes` bytes of NaN, `offset` (below 4096) bytes after a page boundary. Throws
// std::bad_alloc.
Buffer& allocate_guarded(size_t bytes, size_t offset, const std::string& label);
// Reports canaries that were written over, and takes the buffer away: later accesses are out of
// bounds.
void free_guarded(const unsigned char* begin);

bool in_heap(const void* address);
// The buffer that holds all of [address, address + bytes), or null.
Buffer* find_buffer(const void* address, size_t bytes);
// "4 bytes past the end of the 64 bytes of 'weight'": where an address lies that no buffer holds.
std::string describe_stray(const void* address);

}  // namespace llmkernels::emulator

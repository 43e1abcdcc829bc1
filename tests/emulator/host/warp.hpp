// Shuffles, votes and reductions: collectives of the lanes named in a mask. They exchange registers
// and order no memory.
#pragma once

#include <cstring>

#include "language.hpp"

namespace llmkernels::emulator {

constexpr int kKeepOwn = -1;  // the source lane of a shuffle that falls outside its segment

// The value that lane `source` gave, of the shuffle called `name`.
uint64_t warp_shuffle(const char* name, unsigned mask, uint64_t value, int source);
// The lanes of the mask whose predicate is true.
unsigned warp_ballot(const char* name, unsigned mask, bool predicate);

// What combine makes of the values of the lanes of the mask.
uint32_t warp_reduce(const char* name, unsigned mask, uint32_t value,
                     uint32_t (*combine)(uint32_t, uint32_t));

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_shuffle(name, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The first lane of this lane's segment of `width` lanes.
inline int segment(int width) { return static_cast<int>(current->lane) & ~(width - 1); }

}  // namespace llmkernels::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  namespace emulator = ::llmkernels::emulator;
  return emulator::shuffle("__shfl_sync", mask, value,
                           emulator::segment(width) + (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  namespace emulator = ::llmkernels::emulator;
  const int source = static_cast<int>(emulator::current->lane) ^ lane_mask;
  // A lane of a lower segment may be read, one of a higher segment not: PTX's rule for shfl.bfly.
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle("__shfl_xor_sync", mask, value, inside ? source : emulator::kKeepOwn);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  namespace emulator = ::llmkernels::emulator;
  const int source = static_cast<int>(emulator::current->lane + delta);
  const bool inside = source < emulator::segment(width) + width;
  return emulator::shuffle("__shfl_down_sync", mask, value, inside ? source : emulator::kKeepOwn);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  namespace emulator = ::llmkernels::emulator;
  const int source = static_cast<int>(emulator::current->lane) - static_cast<int>(delta);
  const bool inside = source >= emulator::segment(width);
  return emulator::shuffle("__shfl_up_sync", mask, value, inside ? source : emulator::kKeepOwn);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::llmkernels::emulator::warp_ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return ::llmkernels::emulator::warp_ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return ::llmkernels::emulator::warp_ballot("__all_sync", mask, predicate == 0) == 0;
}

// redux.sync, of integers.
#define LLMKERNELS_EMULATOR_REDUCTION(name, type, expression)                          \
  inline type name(unsigned mask, type value) {                                        \
    return static_cast<type>(::llmkernels::emulator::warp_reduce(                      \
        #name, mask, static_cast<uint32_t>(value), [](uint32_t left, uint32_t right) { \
          [[maybe_unused]] const auto a = static_cast<type>(left);                     \
          [[maybe_unused]] const auto b = static_cast<type>(right);                    \
          return static_cast<uint32_t>(expression);                                    \
        }));                                                                           \
  }
LLMKERNELS_EMULATOR_REDUCTION(__reduce_add_sync, unsigned, a + b)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_min_sync, unsigned, a < b ? a : b)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_max_sync, unsigned, a < b ? b : a)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_add_sync, int, left + right)  // wraps around
LLMKERNELS_EMULATOR_REDUCTION(__reduce_min_sync, int, a < b ? a : b)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_max_sync, int, a < b ? b : a)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_and_sync, unsigned, a& b)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_or_sync, unsigned, a | b)
LLMKERNELS_EMULATOR_REDUCTION(__reduce_xor_sync, unsigned, a ^ b)
#undef LLMKERNELS_EMULATOR_REDUCTION

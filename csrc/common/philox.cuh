// Philox-4x32-7 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
#pragma once

#include "platform.cuh"

namespace llmkernels {

// Four random words of the 64-bit key ``seed`` at the 128-bit counter whose upper half is 0.
__device__ __forceinline__ uint4 philox_4x32_7(uint64_t seed, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter);
  uint32_t c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0;
  uint32_t c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product2 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product2 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product2);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

}  // namespace llmkernels

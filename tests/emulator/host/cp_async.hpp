// csrc/sm80/cp_async.cuh: copies that stay in flight until their group is waited for.
#pragma once

#include <cstdint>

namespace llmkernels::emulator {

void cp_async_ca_4(uint32_t destination_smem, const void* source_gmem, int source_bytes = 4);
void cp_async_ca_8(uint32_t destination_smem, const void* source_gmem, int source_bytes = 8);
void cp_async_cg_16(uint32_t destination_smem, const void* source_gmem, int source_bytes = 16);
void cp_async_commit_group();
void cp_async_wait_pending(int pending);

template <int kPending>
inline void cp_async_wait_group() {
  cp_async_wait_pending(kPending);
}

}  // namespace llmkernels::emulator

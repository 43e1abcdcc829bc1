// One way to launch a kernel. Both worlds check the same limits and return the same errors.
#pragma once

#include "platform.cuh"

namespace llmkernels {

#ifdef LLMKERNELS_EMULATOR

using emulator::launch;

#else

// Dynamic shared memory that a kernel may use without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...). An error is returned and also
// cleared, so that the next launch does not report it again.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kDefaultSharedBytes) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

#endif

}  // namespace llmkernels

// What a launch depends on besides its arguments.
#pragma once

#include "platform.cuh"

namespace llmkernels {

struct Device {
  int multiprocessors = 0;
  int block_shared_bytes = 0;  // that one block may ask for
};

inline cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->block_shared_bytes,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return error;
}

__host__ __device__ inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace llmkernels

#include "grid.hpp"

#include <mutex>

#include "../host/launch.hpp"
#include "block.hpp"
#include "faults.hpp"
#include "race.hpp"

namespace llmkernels::emulator {

uint3 block_index;
dim3 block_shape, grid_shape;

namespace {

std::set<const void*> launched;

cudaError_t check_launch(dim3 grid, dim3 shape, size_t shared_bytes) {
  const bool empty =
      grid.x == 0 || grid.y == 0 || grid.z == 0 || shape.x == 0 || shape.y == 0 || shape.z == 0;
  const bool large = grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 || shape.z > 64 ||
                     uint64_t{shape.x} * shape.y * shape.z > 1024;
  if (empty || large) return cudaErrorInvalidConfiguration;
  return shared_bytes > kSharedBytesLimit ? cudaErrorInvalidValue : cudaSuccess;
}

bool run_blocks(size_t shared_bytes) {
  for (unsigned z = 0; z < grid_shape.z; ++z) {
    for (unsigned y = 0; y < grid_shape.y; ++y) {
      for (unsigned x = 0; x < grid_shape.x; ++x) {
        block_index = {x, y, z};
        if (!run_block(shared_bytes)) return false;
      }
    }
  }
  return true;
}

}  // namespace

const std::set<const void*>& launched_kernels() { return launched; }

cudaError_t run_grid(const void* kernel, dim3 grid, dim3 shape, size_t shared_bytes,
                     ThreadBody body, const void* argument) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (const cudaError_t error = check_launch(grid, shape, shared_bytes)) return error;
  const FaultHandlers handlers;
  launched.insert(kernel);
  grid_shape = grid;
  block_shape = shape;
  if (options.race) race_begin_launch();
  start_grid(body, argument);
  return run_blocks(shared_bytes) ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace llmkernels::emulator

// CUDA's keywords, vector types and built-in variables.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace llmkernels::emulator {

constexpr unsigned kWarpSize = 32;
constexpr size_t kSharedBytesLimit = 227 * 1024;  // what one block of sm_90 may ask for

// The part of a CUDA thread that its kernel can see.
struct ThreadIdentity {
  uint3 index;
  unsigned linear, warp, lane;
};

extern const ThreadIdentity* current;  // the thread whose fiber runs
extern uint3 block_index;
extern dim3 block_shape, grid_shape;

unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);
inline unsigned char* shared_pointer(uint32_t address) { return shared_memory() + address; }

}  // namespace llmkernels::emulator

namespace llmkernels {
using emulator::shared_address;
using emulator::shared_pointer;
}  // namespace llmkernels

#define threadIdx (::llmkernels::emulator::current->index)
#define blockIdx (::llmkernels::emulator::block_index)
#define blockDim (::llmkernels::emulator::block_shape)
#define gridDim (::llmkernels::emulator::grid_shape)
constexpr int warpSize = ::llmkernels::emulator::kWarpSize;

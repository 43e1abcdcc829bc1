// The running sums over rows of the columns that a thread owns: dweight or dbias of one partial
// row.
#pragma once

#include <type_traits>

#include "../common/reduce.cuh"
#include "../common/vector.cuh"

namespace llmkernels {

// In registers, of the rows that a warp's lanes hold; write() adds up those of the block through
// shared memory.
template <int kVectors, int kColumns, typename Tile>
class RegisterSums {
 public:
  static constexpr int kSharedBytesPerThread =
      kVectors * kColumns * static_cast<int>(sizeof(float));

  __device__ __forceinline__ explicit RegisterSums(unsigned char* shared)
      : exchange_(reinterpret_cast<float*>(shared)) {}

  __device__ __forceinline__ void add(int i, const float (&values)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums_[i][j] += values[j];
  }

  // The whole block takes part.
  __device__ __forceinline__ void write(const Matrix& partial, int n) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        exchange_[(i * kColumns + j) * Tile::kMaxThreads + threadIdx.x] = sums_[i][j];
      }
    }
    __syncthreads();
    const int thread = threadIdx.x;
    if (thread >= Tile::threads()) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float* rows = exchange_ + (i * kColumns + j) * Tile::kMaxThreads + thread;
        for (int row = 1; row < Tile::kRows; ++row) sums_[i][j] += rows[row * Tile::threads()];
      }
      store_values(partial, blockIdx.x, slot_of<kColumns>(i, Tile::threads(), thread, n), sums_[i]);
    }
  }

 private:
  float sums_[kVectors][kColumns] = {};
  float* exchange_;
};

// In shared memory, since 64 registers don't hold them. Each thread touches its own words only, so
// no barrier is needed; neighbouring threads have neighbouring vectors, so that no bank is met
// twice in one access.
template <int kVectors, int kColumns, typename Tile>
class SharedSums {
 public:
  static constexpr int kSharedBytesPerThread =
      kVectors * kColumns * static_cast<int>(sizeof(float));

  __device__ __forceinline__ explicit SharedSums(unsigned char* shared)
      : sums_(reinterpret_cast<Vector*>(shared) + threadIdx.x) {
#pragma unroll
    for (int k = 0; k < kVectors * kColumns / kWidth; ++k) sums_[k * blockDim.x] = Vector{};
  }

  __device__ __forceinline__ void add(int i, const float (&values)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; j += kWidth) {
      Vector& place = sums_[(i * kColumns + j) / kWidth * blockDim.x];
      Vector sum = place;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum.values[k] += values[j + k];
      place = sum;
    }
  }

  __device__ __forceinline__ void write(const Matrix& partial, int n) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float values[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; j += kWidth) {
        const Vector sum = sums_[(i * kColumns + j) / kWidth * blockDim.x];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[j + k] = sum.values[k];
      }
      store_values(partial, blockIdx.x, slot_of<kColumns>(i, Tile::threads(), threadIdx.x, n),
                   values);
    }
  }

 private:
  static constexpr int kWidth = kColumns < 4 ? kColumns : 4;
  struct alignas(kWidth * sizeof(float)) Vector {
    float values[kWidth] = {};
  };

  Vector* sums_;
};

template <typename Element, typename Tile>
using ColumnSums = std::conditional_t<
    Tile::kIsBlock,
    SharedSums<Tile::kColumnsPerThread / Element::kColumns, Element::kColumns, Tile>,
    RegisterSums<Tile::kColumnsPerThread / Element::kColumns, Element::kColumns, Tile>>;

}  // namespace llmkernels

// Which columns of a row a thread owns, and moving them between global memory and registers.
#pragma once

#include "platform.cuh"

#include "convert.cuh"

namespace llmkernels {

// kColumns adjacent columns of one row, from ``first`` on. N is a multiple of kColumns: all of them
// are inside or none.
struct Slot {
  int first;
  bool inside;
};

// A row's slots lie side by side over its threads, so that a warp's accesses are adjacent.
template <int kColumns>
__device__ __forceinline__ Slot slot_of(int index, int threads, int thread, int n) {
  const int first = (index * threads + thread) * kColumns;
  return {first, first < n};
}

__device__ __forceinline__ char* address_of(const Matrix& matrix, Dtype dtype, int64_t row,
                                            const Slot& slot) {
  return static_cast<char*>(matrix.data) + (row * matrix.row_stride + slot.first) * bytes_of(dtype);
}

// In accesses of up to 16 bytes. Outside the row the words become zero. dtype is the matrix's,
// passed beside it where it is known at compile time.
template <int kColumns>
__device__ __forceinline__ void load(const Matrix& matrix, Dtype dtype, int64_t row,
                                     const Slot& slot, Raw<kColumns>& raw) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) raw.words[j] = 0;
  if (!slot.inside) return;
  const char* address = address_of(matrix, dtype, row, slot);
  if (dtype == Dtype::kFloat32) {
    if constexpr (kColumns == 1) {
      raw.words[0] = *reinterpret_cast<const uint32_t*>(address);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        const uint4 words = reinterpret_cast<const uint4*>(address)[j / 4];
        raw.words[j] = words.x, raw.words[j + 1] = words.y;
        raw.words[j + 2] = words.z, raw.words[j + 3] = words.w;
      }
    }
  } else if constexpr (kColumns == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(address);
    raw.words[0] = words.x, raw.words[1] = words.y, raw.words[2] = words.z, raw.words[3] = words.w;
  } else if constexpr (kColumns == 4) {
    const uint2 words = *reinterpret_cast<const uint2*>(address);
    raw.words[0] = words.x, raw.words[1] = words.y;
  } else {
    static_assert(kColumns == 1);
    raw.words[0] = *reinterpret_cast<const uint16_t*>(address);
  }
}

template <int kColumns>
__device__ __forceinline__ void store(const Matrix& matrix, int64_t row, const Slot& slot,
                                      const Raw<kColumns>& raw) {
  if (!slot.inside) return;
  char* address = address_of(matrix, matrix.dtype, row, slot);
  if (matrix.dtype == Dtype::kFloat32) {
    if constexpr (kColumns == 1) {
      *reinterpret_cast<uint32_t*>(address) = raw.words[0];
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; j += 4) {
        reinterpret_cast<uint4*>(address)[j / 4] =
            make_uint4(raw.words[j], raw.words[j + 1], raw.words[j + 2], raw.words[j + 3]);
      }
    }
  } else if constexpr (kColumns == 8) {
    *reinterpret_cast<uint4*>(address) =
        make_uint4(raw.words[0], raw.words[1], raw.words[2], raw.words[3]);
  } else if constexpr (kColumns == 4) {
    *reinterpret_cast<uint2*>(address) = make_uint2(raw.words[0], raw.words[1]);
  } else {
    static_assert(kColumns == 1);
    *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(raw.words[0]);
  }
}

template <int kColumns>
__device__ __forceinline__ void load_values(const Matrix& matrix, int64_t row, const Slot& slot,
                                            float (&values)[kColumns]) {
  Raw<kColumns> raw;
  load(matrix, matrix.dtype, row, slot, raw);
  unpack(matrix.dtype, raw, values);
}

template <int kColumns>
__device__ __forceinline__ void store_values(const Matrix& matrix, int64_t row, const Slot& slot,
                                             const float (&values)[kColumns]) {
  Raw<kColumns> raw;
  pack(matrix.dtype, values, raw);
  store(matrix, row, slot, raw);
}

// Whether every row of the operand can be moved in vectors of ``columns`` columns.
inline bool is_vector_aligned(const Matrix& matrix, int columns) {
  const int bytes = bytes_of(matrix.dtype);
  const int64_t vector_bytes = min(columns * bytes, 16);
  return reinterpret_cast<uintptr_t>(matrix.data) % vector_bytes == 0 &&
         matrix.row_stride * bytes % vector_bytes == 0;
}

}  // namespace llmkernels

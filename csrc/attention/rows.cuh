// Moving rows of a head between global memory, swizzled tiles in shared memory and accumulators.
#pragma once

#include "../common/convert.cuh"
#include "../common/reduce.cuh"
#include "../common/swizzle.cuh"
#include "../sm80/cp_async.cuh"
#include "../sm80/fragments.cuh"
#include "walk.cuh"

namespace llmkernels::attention {

template <typename Element>
inline constexpr int kElementBytes = bytes_of(Element::dtype({}));

// From lane 0, so that the compiler knows it to be one number for the warp.
template <int kWarps>
__device__ __forceinline__ int warp_id() {
  if constexpr (kWarps == 1) return 0;
  return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpThreads, 0);
}

// Rows of one head, from the first of its sequence on.
struct Rows {
  unsigned char* data;
  int stride_bytes;
  int bytes;  // of the columns of one row
};

template <typename Element>
__device__ __forceinline__ Rows rows_of(const HeadRows& tensor, int batch, int head, int start,
                                        int columns) {
  constexpr int kBytes = kElementBytes<Element>;
  const int64_t offset =
      batch * tensor.batch_stride + head * tensor.head_stride + start * tensor.row_stride;
  return {static_cast<unsigned char*>(tensor.data) + offset * kBytes,
          static_cast<int>(tensor.row_stride) * kBytes, columns * kBytes};
}

// Starts to copy kRows rows from ``first`` on into a tile; zeros stand for rows before ``low`` and
// from ``high`` on, and beyond the last column. The loop stays rolled: unrolled, the addresses of
// its copies take the registers that the products need. A warp writes neighbouring chunks of rows,
// without bank conflicts (swizzle.cuh, 1).
template <int kRows, int kRowBytes, int kThreads>
__device__ __forceinline__ void load_tile(unsigned char* tile, const Rows& rows, int first, int low,
                                          int high) {
  constexpr int kChunks = kRowBytes / kChunkBytes;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies as many chunks");
  const uint32_t tile_smem = shared_address(tile);
#pragma unroll 1
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kChunks, chunk = index % kChunks;
    const int position = first + row;
    const bool inside = position >= low && position < high;
    const int bytes = inside ? min(max(rows.bytes - chunk * kChunkBytes, 0), kChunkBytes) : 0;
    const unsigned char* source =
        rows.data + (bytes > 0 ? int64_t{position} * rows.stride_bytes + chunk * kChunkBytes : 0);
    cp_async_cg_16(tile_smem + swizzled<kRowBytes>(row, chunk), source, bytes);
  }
}

// Lays a warp's sums times ``factors`` (of rows g and g + 8 of each 16) out in rows tile_row.. of a
// tile that no other warp uses any more.
template <typename Element, int kRowBytes, int kM, int kD>
__device__ __forceinline__ void lay_out(unsigned char* tile, int tile_row,
                                        const float (&sums)[kM][kD][4],
                                        const float (&factors)[kM][2]) {
  constexpr int kBytes = kElementBytes<Element>;
  __syncwarp();
  // Without bank conflicts, either size of elements: swizzle.cuh, 2 and 3.
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int d = 0; d < kD; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = sums[i][d][2 * half] * factors[i][half];
        const float high = sums[i][d][2 * half + 1] * factors[i][half];
        const int row = tile_row + 16 * i + accumulator_row(2 * half);
        const int column = 8 * d + accumulator_column(0);
        unsigned char* pair = tile + swizzled_byte<kRowBytes>(row, column * kBytes);
        if constexpr (kBytes == 4) {
          *reinterpret_cast<float2*>(pair) = make_float2(low, high);
        } else {
          *reinterpret_cast<uint32_t*>(pair) = pack_pair<Element>(low, high);
        }
      }
    }
  }
  __syncwarp();
}

// Writes rows of a tile that this warp has laid out to rows first.. below ``length``, 16 bytes a
// lane.
template <typename Element, int kRowBytes, int kRows>
__device__ __forceinline__ void write_rows(const unsigned char* tile, int tile_row,
                                           const Rows& rows, int first, int length) {
  constexpr int kChunks = kRowBytes / kChunkBytes;
  constexpr int kBytes = kElementBytes<Element>;
  const bool is_aligned =
      (reinterpret_cast<uintptr_t>(rows.data) | static_cast<unsigned>(rows.stride_bytes)) %
          kChunkBytes ==
      0;
#pragma unroll(kElementBytes<Element> == 4 ? 1 : 4)
  for (int index = lane_id(); index < kRows * kChunks; index += kWarpThreads) {
    const int row = index / kChunks, begin = index % kChunks * kChunkBytes;
    if (first + row >= length) continue;
    const unsigned char* source = tile + swizzled<kRowBytes>(tile_row + row, index % kChunks);
    unsigned char* target = rows.data + int64_t{first + row} * rows.stride_bytes + begin;
    if (is_aligned && begin + kChunkBytes <= rows.bytes) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(source);
      continue;
    }
    for (int byte = 0; byte < kChunkBytes && begin + byte < rows.bytes; byte += kBytes) {
      if constexpr (kBytes == 4) {
        *reinterpret_cast<float*>(target + byte) = *reinterpret_cast<const float*>(source + byte);
      } else {
        *reinterpret_cast<uint16_t*>(target + byte) =
            *reinterpret_cast<const uint16_t*>(source + byte);
      }
    }
  }
}

// A word of one or two elements with 0 in place of NaN and infinities.
template <typename Element>
__device__ __forceinline__ uint32_t finite_part(uint32_t word) {
  if constexpr (kElementBytes<Element> == 4) {
    return (word & 0x7f800000u) == 0x7f800000u ? 0 : word;
  } else {
    constexpr uint32_t kExponent = Element::dtype({}) == Dtype::kBFloat16 ? 0x7f80u : 0x7c00u;
    const uint32_t low = (word & kExponent) == kExponent ? 0 : 0xffffu;
    const uint32_t high = (word >> 16 & kExponent) == kExponent ? 0 : 0xffff0000u;
    return word & (low | high);
  }
}

// Puts 0 in place of NaN and infinities, which would become NaN times a weight of 0. Between two
// barriers of its own: before, all warps have read what they want of the tile as it was.
template <typename Element, int kBytes, int kThreads>
__device__ __forceinline__ void drop_nonfinite(unsigned char* tile) {
  __syncthreads();
#pragma unroll(kElementBytes<Element> == 4 ? 1 : 4)
  for (int byte = static_cast<int>(threadIdx.x) * kChunkBytes; byte < kBytes;
       byte += kThreads * kChunkBytes) {
    uint4* chunk = reinterpret_cast<uint4*>(tile + byte);
    const uint4 words = *chunk;
    *chunk = make_uint4(finite_part<Element>(words.x), finite_part<Element>(words.y),
                        finite_part<Element>(words.z), finite_part<Element>(words.w));
  }
  __syncthreads();
}

template <typename Element>
__device__ __forceinline__ float load_element(const unsigned char* element) {
  if constexpr (kElementBytes<Element> == 4) {
    return *reinterpret_cast<const float*>(element);
  } else {
    return unpack_pair<Element>(*reinterpret_cast<const uint16_t*>(element)).x;
  }
}

template <typename Element>
__device__ __forceinline__ void store_element(unsigned char* element, float value) {
  if constexpr (kElementBytes<Element> == 4) {
    *reinterpret_cast<float*>(element) = value;
  } else {
    *reinterpret_cast<uint16_t*>(element) = static_cast<uint16_t>(pack_pair<Element>(value, 0.0f));
  }
}

}  // namespace llmkernels::attention

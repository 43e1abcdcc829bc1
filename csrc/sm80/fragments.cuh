// Fragments of mma.sync (mma.cuh) from swizzled tiles in shared memory and from accumulators.
//
// ``tile`` is the start of a tile whose rows have kRowBytes bytes (../common/swizzle.cuh), as a
// shared address or, where elements are read one by one, as a pointer; chunks are 16 bytes: 8
// elements of 16 bits or 4 of 32. A fragment of A covers 16 rows and two chunks of k; one of B two
// chunks of k and 16 columns: words 0 and 1 belong to columns 0-7, words 2 and 3 to columns 8-15.
#pragma once

#include "../common/convert.cuh"
#include "../common/swizzle.cuh"
#include "ldmatrix.cuh"

namespace llmkernels {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }

// Where element e of a lane's accumulator lies in its 16 x 8 matrix.
__device__ __forceinline__ int accumulator_row(int e) { return lane_id() / 4 + e / 2 * 8; }
__device__ __forceinline__ int accumulator_column(int e) { return lane_id() % 4 * 2 + e % 2; }

// A from rows of k: tile [M, K], from row ``m`` and chunk ``k_chunk``. Any element type.
template <int kRowBytes>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int m, int k_chunk) {
  const int lane = lane_id();
  ldmatrix_x4(a, tile + swizzled<kRowBytes>(m + lane % 16, k_chunk + lane / 16));
}

// B from rows of k: tile [N, K], the transpose of B, from row ``n`` and chunk ``k_chunk``. Any
// element type.
template <int kRowBytes>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int n, int k_chunk) {
  const int lane = lane_id();
  ldmatrix_x4(b, tile + swizzled<kRowBytes>(n + lane % 8 + lane / 16 * 8, k_chunk + lane / 8 % 2));
}

// A from columns of k: tile [K, M], from row ``k`` and chunk ``m_chunk``. 16-bit elements.
template <int kRowBytes>
__device__ __forceinline__ void load_a_trans(uint32_t (&a)[4], uint32_t tile, int k, int m_chunk) {
  const int lane = lane_id();
  ldmatrix_x4_trans(
      a, tile + swizzled<kRowBytes>(k + lane % 8 + lane / 16 * 8, m_chunk + lane / 8 % 2));
}

// B from columns of k: tile [K, N], from row ``k`` and chunk ``n_chunk``. 16-bit elements.
template <int kRowBytes>
__device__ __forceinline__ void load_b_trans(uint32_t (&b)[4], uint32_t tile, int k, int n_chunk) {
  const int lane = lane_id();
  ldmatrix_x4_trans(b, tile + swizzled<kRowBytes>(k + lane % 16, n_chunk + lane / 16));
}

// Which rows of a step of 8 the two k of a lane are, of 32-bit elements: t and t + 4 beside
// fragments of ldmatrix, 2t and 2t + 1 beside fragments made of accumulators. A product does not
// mind the order of k, as long as both operands have the same.
enum class KOrder { kMatrix, kAccumulator };

template <KOrder kOrder>
__device__ __forceinline__ int k_of(int half) {
  const int t = lane_id() % 4;
  return kOrder == KOrder::kMatrix ? t + 4 * half : 2 * t + half;
}

template <int kRowBytes>
__device__ __forceinline__ uint32_t load_word(const unsigned char* tile, int row, int column) {
  return *reinterpret_cast<const uint32_t*>(tile + swizzled_byte<kRowBytes>(row, column * 4));
}

// load_a_trans of 32-bit elements: tile [K, M], from row ``k`` and column ``m``, a multiple of 8.
template <int kRowBytes, KOrder kOrder>
__device__ __forceinline__ void load_a_trans_32(uint32_t (&a)[4], const unsigned char* tile, int k,
                                                int m) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = load_word<kRowBytes>(tile, k + k_of<kOrder>(i / 2), m + lane_id() / 4 + i % 2 * 8);
}

// load_b_trans of 32-bit elements: tile [K, N], from row ``k`` and column ``n``, a multiple of 8.
template <int kRowBytes, KOrder kOrder>
__device__ __forceinline__ void load_b_trans_32(uint32_t (&b)[4], const unsigned char* tile, int k,
                                                int n) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    b[i] = load_word<kRowBytes>(tile, k + k_of<kOrder>(i % 2), n + lane_id() / 4 + i / 2 * 8);
}

// A of K = 16 out of the accumulators of columns 0-7 and 8-15, rounded to 16 bits.
template <typename Element>
__device__ __forceinline__ void a_of_accumulators(uint32_t (&a)[4], const float (&left)[4],
                                                  const float (&right)[4]) {
  a[0] = pack_pair<Element>(left[0], left[1]);
  a[1] = pack_pair<Element>(left[2], left[3]);
  a[2] = pack_pair<Element>(right[0], right[1]);
  a[3] = pack_pair<Element>(right[2], right[3]);
}

// A of K = 8 out of one accumulator, as float32 and in KOrder::kAccumulator: round or split it
// (tf32.cuh).
__device__ __forceinline__ void a_of_accumulator_32(uint32_t (&a)[4], const float (&d)[4]) {
  a[0] = __float_as_uint(d[0]);
  a[1] = __float_as_uint(d[2]);
  a[2] = __float_as_uint(d[1]);
  a[3] = __float_as_uint(d[3]);
}

}  // namespace llmkernels

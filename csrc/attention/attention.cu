// The host side of the op, and the kernel that prepares backward.
#include "attention.h"

#include <cmath>

#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "launchers.h"
#include "rows.cuh"
#include "tiles.h"

namespace llmkernels {
namespace attention {

// 16 bytes of one row, zeros beyond its last column.
template <typename Element>
__device__ __forceinline__ void load_chunk(const Rows& rows, int64_t row, int begin,
                                           float (&values)[Element::kColumns]) {
  constexpr int kBytes = kElementBytes<Element>;
  const unsigned char* chunk = rows.data + row * rows.stride_bytes + begin;
  Raw<Element::kColumns> raw = {};
  if (begin + kChunkBytes <= rows.bytes) {
    const uint4 words = *reinterpret_cast<const uint4*>(chunk);
    raw.words[0] = words.x, raw.words[1] = words.y, raw.words[2] = words.z, raw.words[3] = words.w;
  } else {
#pragma unroll
    for (int j = 0; j < Element::kColumns; ++j) {
      if (begin + j * kBytes >= rows.bytes) continue;
      if constexpr (kBytes == 4) {
        raw.words[j] = *reinterpret_cast<const uint32_t*>(chunk + j * kBytes);
      } else {
        raw.words[j / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(chunk + j * kBytes)}
                            << j % 2 * 16;
      }
    }
  }
  unpack(Element::dtype({}), raw, values);
}

// delta = rowsum(out dout) - dlse and the logsumexp to base 2, of kDeltaThreads / kDeltaLanes rows
// of one head a block. The out of a row that sees no key is 0: whatever comes in for it, even NaN,
// adds 0. Its delta is then -dlse if the sink takes all of its weight, and else 0.
template <typename Element>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_backward_delta_kernel(const __grid_constant__ AttentionBackward p) {
  constexpr int kRows = kDeltaThreads / kDeltaLanes;
  const int tiles = divide_up(p.length_q, kRows), pair = static_cast<int>(blockIdx.x) / tiles;
  const int query =
      static_cast<int>(blockIdx.x) % tiles * kRows + static_cast<int>(threadIdx.x) / kDeltaLanes;
  const int lane = static_cast<int>(threadIdx.x) % kDeltaLanes;
  const Rows out = rows_of<Element>(p.out, pair / p.heads, pair % p.heads, 0, p.value_dim);
  const Rows dout = rows_of<Element>(p.dout, pair / p.heads, pair % p.heads, 0, p.value_dim);
  float sum = 0.0f;
  for (int begin = lane * kChunkBytes; query < p.length_q && begin < out.bytes;
       begin += kDeltaLanes * kChunkBytes) {
    float o[Element::kColumns], g[Element::kColumns];
    load_chunk<Element>(out, query, begin, o);
    load_chunk<Element>(dout, query, begin, g);
#pragma unroll
    for (int j = 0; j < Element::kColumns; ++j) sum += o[j] == 0.0f ? 0.0f : o[j] * g[j];
  }
  sum = warp_sum<kDeltaLanes>(sum);
  if (lane != 0 || query >= p.length_q) return;
  const int64_t row = int64_t{pair} * p.length_q + query;
  const float lse = p.lse[row];
  if (p.dlse != nullptr) sum -= p.dlse[row];
  p.lse_log2[row] = lse * kLog2E;
  p.delta[row] = lse == -INFINITY ? 0.0f : sum;
}

template <typename Element>
static cudaError_t backward_of(const AttentionBackward& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const int pairs = p.batches * p.heads;
  if (pairs > 0 && p.length_q > 0) {
    const int tiles = divide_up(p.length_q, kDeltaThreads / kDeltaLanes);
    error = launch(attention_backward_delta_kernel<Element>, static_cast<unsigned>(tiles * pairs),
                   kDeltaThreads, 0, stream, p);
  }
  const bool is_any = p.sequences > 0 && p.heads > 0;
  if (error == cudaSuccess && is_any && p.max_seqlen_k > 0)
    error = backward_keys_of<Element>(p, stream);
  if (error == cudaSuccess && is_any && p.max_seqlen_q > 0)
    error = backward_queries_of<Element>(p, stream);
  if (error == cudaSuccess && p.dbias != nullptr) error = backward_bias_of<Element>(p, stream);
  return error;
}

template <typename Action>
static cudaError_t with_element(Dtype dtype, Action action) {
  if (dtype == Dtype::kFloat32) return action(Float32{});
  return dtype == Dtype::kBFloat16 ? action(BFloat16{}) : action(Float16{});
}

}  // namespace attention

cudaError_t attention_forward(const AttentionForward& p, cudaStream_t stream) {
  if (p.sequences == 0 || p.heads == 0 || p.max_seqlen_q == 0) return cudaSuccess;
  return attention::with_element(
      p.dtype, [&](auto element) { return attention::forward_of<decltype(element)>(p, stream); });
}

cudaError_t attention_backward(const AttentionBackward& p, cudaStream_t stream) {
  return attention::with_element(
      p.dtype, [&](auto element) { return attention::backward_of<decltype(element)>(p, stream); });
}

}  // namespace llmkernels

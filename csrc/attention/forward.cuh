// Forward: the online softmax of FlashAttention-2 (Dao, arXiv 2307.08691). A block owns queries of
// one head; weights go from the accumulators of one product to the operand of the next in
// registers.
#pragma once

#include "../common/launch.cuh"
#include "launchers.h"
#include "logits.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "tiles.h"

namespace llmkernels::attention {

template <typename Tile, typename Element>
struct alignas(128) ForwardStorage {
  static constexpr int kRowBytes = Tile::kHeadDim * kElementBytes<Element>;
  unsigned char q[Tile::kOwned * kRowBytes];  // in the end a warp's rows of out
  unsigned char k[2][Tile::kWalked * kRowBytes];
  unsigned char v[2][Tile::kWalked * kRowBytes];
  int nonfinite[Tile::kWarps];
};

// The running softmax of the rows g and g + 8 of each 16.
template <int kM>
struct Softmax {
  float max_log2[kM][2];  // of the logits
  float total[kM][2];     // of this lane's weights

  // The sink is a logit that all lanes know of and one counts.
  __device__ __forceinline__ Softmax(const float* sinks, int head) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max_log2[i][half] = sinks == nullptr ? -INFINITY : sinks[head] * kLog2E;
        total[i][half] = sinks != nullptr && lane_id() % 4 == 0 ? 1.0f : 0.0f;
      }
    }
  }

  // What exponents are taken relative to: of rows that have seen no key -inf - -inf would be NaN.
  __device__ __forceinline__ float pivot(int i, int half) const {
    return max_log2[i][half] == -INFINITY ? 0.0f : max_log2[i][half];
  }

  // Takes in the maximum of factor * scores, and brings the sums to it.
  template <int kN, int kD>
  __device__ __forceinline__ void rescale(const float (&scores)[kM][kN][4], float factor,
                                          float (&sums)[kM][kD][4]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          largest = fmaxf(largest, fmaxf(scores[i][n][2 * half], scores[i][n][2 * half + 1]));
        const float before = max_log2[i][half];
        max_log2[i][half] = fmaxf(before, warp_max<4>(largest) * factor);
        const float correction = ex2_approx_ftz_f32(before - pivot(i, half));
        total[i][half] *= correction;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          sums[i][d][2 * half] *= correction;
          sums[i][d][2 * half + 1] *= correction;
        }
      }
    }
  }

  // Scores become weights.
  template <int kN>
  __device__ __forceinline__ void exponentiate(float (&scores)[kM][kN][4], float factor) {
    for_each<kM, kN>([&](int i, int n, int e) {
      scores[i][n][e] = ex2_approx_ftz_f32(fmaf(scores[i][n][e], factor, -pivot(i, e / 2)));
      total[i][e / 2] += scores[i][n][e];
    });
  }
};

// Adds the NaN and infinities among the values first_key to last_key - 1 to those of a warp's rows
// of out that see them, laid out in rows tile_row.. of a tile. Rare: all loops are rolled.
template <typename Element, int kRowBytes, int kRows>
__device__ __forceinline__ void add_nonfinite(const Attention& p, const Head& head, const Rows& v,
                                              int first_key, int last_key, int first_query,
                                              unsigned char* tile, int tile_row) {
#pragma unroll 1
  for (int key = first_key; key < last_key; ++key) {
    const unsigned char* values = v.data + int64_t{key} * v.stride_bytes;
#pragma unroll 1
    for (int first = 0; first < v.bytes; first += kWarpThreads * kElementBytes<Element>) {
      const int byte = first + lane_id() * kElementBytes<Element>;
      const float value = byte < v.bytes ? load_element<Element>(values + byte) : 0.0f;
      const bool is_nonfinite = !(fabsf(value) < INFINITY);
      if (!__any_sync(kFullWarp, is_nonfinite)) continue;
#pragma unroll 1
      for (int row = 0; row < kRows; ++row) {
        if (!is_nonfinite || !is_visible(p, head, first_query + row, key)) continue;
        unsigned char* element = tile + swizzled_byte<kRowBytes>(tile_row + row, byte);
        store_element<Element>(element, load_element<Element>(element) + value);
      }
    }
  }
  __syncwarp();
}

// Whether any thread of the block passes true. ``flags`` is used once in a kernel.
template <int kWarps>
__device__ __forceinline__ bool block_any(bool mine, int (&flags)[kWarps]) {
  const bool of_warp = __any_sync(kFullWarp, mine);
  if (lane_id() == 0) flags[threadIdx.x / kWarpThreads] = of_warp;
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) any = any || flags[warp] != 0;
  return any;
}

// out = dropout(softmax(logits)) v and the logsumexp of the logits. Block ``tile + tiles *
// (sequence * heads + head)`` walks over the keys that any of its queries sees.
//
// Stage i % 2 holds keys and values of step i: its copies start after the barrier of step i - 1,
// which all warps reach when they are done with step i - 2, and are waited for before that of step
// i.
template <typename Tile, typename Element, bool kFeatures>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_forward_kernel(const __grid_constant__ AttentionForward p) {
  using Storage = ForwardStorage<Tile, Element>;
  constexpr int kRowBytes = Storage::kRowBytes, kM = Tile::kRowTiles, kThreads = Tile::kThreads;
  constexpr int kD = Tile::kHeadDim / 8, kN = Tile::kWalked / 8;
  LLMKERNELS_SHARED(shared);
  Storage& smem = *reinterpret_cast<Storage*>(shared);
  const int block = static_cast<int>(blockIdx.x);
  const Head head = head_of_queries<Tile::kOwned>(p, block);
  const int first_query = first_owned_query<Tile::kOwned>(p, block);
  if (first_query >= head.queries.length) return;
  const int kv_head = head.head / p.group;
  const Rows q = rows_of<Element>(p.q, head.batch, head.head, head.queries.start, p.head_dim);
  const auto walk = walk_over_keys<Tile::kWalked, Tile::kOwned>(p, head, first_query);
  const int visits = walk.visits;
  const int warp_row = warp_id<Tile::kWarps>() * 16 * kM;
  const float factor = logit_factor<kFeatures>(p);

  const auto load_keys = [&](int index) {
    const int first = walk.visit(index).first;
    const Rows k = rows_of<Element>(p.k, head.batch, kv_head, head.keys.start, p.head_dim);
    const Rows v = rows_of<Element>(p.v, head.batch, kv_head, head.keys.start, p.value_dim);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.k[index % 2], k, first, 0, head.keys.length);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.v[index % 2], v, first, 0, head.keys.length);
    cp_async_commit_group();
  };
  load_tile<Tile::kOwned, kRowBytes, kThreads>(smem.q, q, first_query, 0, head.queries.length);
  cp_async_commit_group();

  float sums[kM][kD][4];
  Softmax<kM> softmax(p.sinks, head.head);
  // Once more where values are NaN or infinite, which times a weight of 0 became NaN in rows that
  // do not see them: then without these, and they are added in the end.
  bool is_careful = false;
#pragma unroll 1
  for (;; is_careful = true) {
    set_zero(sums);
    softmax = Softmax<kM>(p.sinks, head.head);
    if (visits > 0) load_keys(0);
#pragma unroll 1
    for (int index = 0; index < visits; ++index) {
      cp_async_wait_group<0>();
      __syncthreads();
      if (index + 1 < visits) load_keys(index + 1);
      if (is_careful) drop_nonfinite<Element, sizeof smem.v[0], kThreads>(smem.v[index % 2]);
      const Visit visit = walk.visit(index);
      const Place<false> place{first_query + warp_row, visit.first};
      float scores[kM][kN][4];
      set_zero(scores);
      multiply_rows<Element, kRowBytes>(scores, smem.q, warp_row, smem.k[index % 2], p.is_exact);
      if constexpr (kFeatures) {
        float capped[kM][kN][4];
        add_features(p, head, place, scores, capped);
      }
      if (visit.is_cut) hide(p, head, place, scores);
      softmax.rescale(scores, factor, sums);
      softmax.exponentiate(scores, factor);
      if constexpr (kFeatures) {
        if (p.dropout.seed != nullptr) {
          for_each_kept<false, kM, kN>(p, head, place, [&](int i, int n, int e, bool is_kept) {
            if (!is_kept) scores[i][n][e] = 0.0f;
          });
        }
      }
      multiply_weights<Element, kRowBytes>(sums, scores, smem.v[index % 2], p.is_exact,
                                           Seen<true>{});
    }
    if (is_careful) break;
    cp_async_wait_group<0>();  // of the queries, where nothing was visited
    bool is_spoilt = false;
    for_each<kM, kD>(
        [&](int i, int d, int e) { is_spoilt = is_spoilt || !(fabsf(sums[i][d][e]) < INFINITY); });
    if (!block_any(is_spoilt, smem.nonfinite)) break;
  }

  float factors[kM][2];
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + warp_row + 16 * i + accumulator_row(2 * half);
      const float total = warp_sum<4>(softmax.total[i][half]);
      // Of a row that sees no key -inf + log2(0) = -inf, or the sink, and out is 0.
      if (lane_id() % 4 == 0 && query < head.queries.length)
        p.lse[row_number(p, head, query)] = (softmax.max_log2[i][half] + log2f(total)) * kLn2;
      factors[i][half] = p.dropout.scale / (total == 0.0f ? 1.0f : total);
    }
  }
  const Rows out = rows_of<Element>(p.out, head.batch, head.head, head.queries.start, p.value_dim);
  lay_out<Element, kRowBytes>(smem.q, warp_row, sums, factors);
  if (is_careful) {
    const Rows v = rows_of<Element>(p.v, head.batch, kv_head, head.keys.start, p.value_dim);
    add_nonfinite<Element, kRowBytes, 16 * kM>(p, head, v, walk.low,
                                               min(walk.high(), head.keys.length),
                                               first_query + warp_row, smem.q, warp_row);
  }
  write_rows<Element, kRowBytes, 16 * kM>(smem.q, warp_row, out, first_query + warp_row,
                                          head.queries.length);
}

template <typename Tile, typename Element, bool kFeatures>
cudaError_t launch_forward(const AttentionForward& p, cudaStream_t stream) {
  using Storage = ForwardStorage<Tile, Element>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const int blocks = divide_up(p.max_seqlen_q, Tile::kOwned) * p.sequences * p.heads;
  return launch(attention_forward_kernel<Tile, Element, kFeatures>, static_cast<unsigned>(blocks),
                Tile::kThreads, sizeof(Storage), stream, p);
}

template <typename Element>
cudaError_t forward_of(const AttentionForward& p, cudaStream_t stream) {
  return with_features<Element>(p, [&](auto features) {
    constexpr bool kFeatures = decltype(features)::value;
    using Table = Tiles<Element, kFeatures>;
    const int columns = max(p.head_dim, p.value_dim);
    if (columns <= 64)
      return launch_forward<typename Table::Forward64, Element, kFeatures>(p, stream);
    if (columns <= 128)
      return launch_forward<typename Table::Forward128, Element, kFeatures>(p, stream);
    return launch_forward<typename Table::Forward256, Element, kFeatures>(p, stream);
  });
}

}  // namespace llmkernels::attention

// dk and dv: a block owns keys of one key head and walks over the queries of its group that see
// some of them, so that every sum has one owner and one order.
#pragma once

#include "gradients.cuh"

namespace llmkernels::attention {

template <typename Tile, typename Element>
struct alignas(128) KeysStorage {
  static constexpr int kRowBytes = Tile::kHeadDim * kElementBytes<Element>;
  unsigned char k[Tile::kOwned * kRowBytes];  // in the end a warp's rows of dk
  unsigned char v[Tile::kOwned * kRowBytes];  // and of dv
  unsigned char q[2][Tile::kWalked * kRowBytes];
  unsigned char dout[2][Tile::kWalked * kRowBytes];
  float lse_log2[2][Tile::kWalked];
  float delta[2][Tile::kWalked];
};

// Of 256 columns a warp has registers for one of the two sums: a block makes dk or dv.
template <typename Tile>
inline constexpr bool kIsSplit = Tile::kHeadDim > 128;

// dk = scale dS^T q and dv = dropout(P)^T dout. Block ``tile + tiles * (sequence * key heads + key
// head)`` visits, of each query head of the group, first the tiles of queries that see all of its
// keys. Its scores are transposed, keys by queries, so that P^T and dS^T are A operands that
// registers hold. Stages as in the forward kernel.
template <typename Tile, typename Element, bool kFeatures>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_keys_kernel(const __grid_constant__ AttentionBackward p) {
  using Storage = KeysStorage<Tile, Element>;
  constexpr int kRowBytes = Storage::kRowBytes, kM = Tile::kRowTiles, kThreads = Tile::kThreads;
  constexpr int kD = Tile::kHeadDim / 8, kN = Tile::kWalked / 8, kDv = kIsSplit<Tile> ? 0 : 1;
  LLMKERNELS_SHARED(shared);
  Storage& smem = *reinterpret_cast<Storage*>(shared);
  const int tiles = divide_up(p.max_seqlen_k, Tile::kOwned), kv_heads = p.heads / p.group;
  const int block = static_cast<int>(blockIdx.x), pair = block / tiles;
  const int kv_head = pair % kv_heads, first_key = block % tiles * Tile::kOwned;
  const bool makes_dk = !kIsSplit<Tile> || blockIdx.y == 0;
  const bool makes_dv = !kIsSplit<Tile> || blockIdx.y == 1;
  Head head = make_head(p, pair / kv_heads, kv_head * p.group);
  const int length_q = head.queries.length, length_k = head.keys.length;
  if (first_key >= length_k) return;
  const Walk<Tile::kWalked> walk(first_key - head.offset,
                                 min(first_key + Tile::kOwned, length_k) - 1 - head.offset, p.right,
                                 p.left, length_q, p.bias.data != nullptr);
  const int visits = walk.visits;
  const int warp_row = warp_id<Tile::kWarps>() * 16 * kM;
  // Of queries outside low to high - 1, which see no key at all, zeros are loaded: NaN in their
  // rows must not meet weights of 0.
  const int low = max(-p.right - head.offset, 0);
  const int high = static_cast<int>(
      max(min(int64_t{length_k} + p.left - head.offset, int64_t{length_q}), int64_t{0}));

  const auto load_queries = [&](int index) {
    const int query_head = kv_head * p.group + index / visits, stage = index % 2;
    const int first = walk.visit(index % visits).first, start = head.queries.start;
    const Rows q = rows_of<Element>(p.q, head.batch, query_head, start, p.head_dim);
    const Rows dout = rows_of<Element>(p.dout, head.batch, query_head, start, p.value_dim);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.q[stage], q, first, low, high);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.dout[stage], dout, first, low, high);
    const int64_t row = (int64_t{head.batch} * p.heads + query_head) * p.length_q + start;
    static_assert(Tile::kWalked <= kThreads);
    if (const int i = static_cast<int>(threadIdx.x); i < Tile::kWalked) {
      const int query = min(first + i, length_q - 1), bytes = first + i < length_q ? 4 : 0;
      cp_async_ca_4(shared_address(&smem.lse_log2[stage][i]), p.lse_log2 + row + query, bytes);
      cp_async_ca_4(shared_address(&smem.delta[stage][i]), p.delta + row + query, bytes);
    }
    cp_async_commit_group();
  };
  const int start = head.keys.start;
  const Rows k = rows_of<Element>(p.k, head.batch, kv_head, start, p.head_dim);
  const Rows v = rows_of<Element>(p.v, head.batch, kv_head, start, p.value_dim);
  load_tile<Tile::kOwned, kRowBytes, kThreads>(smem.k, k, first_key, 0, length_k);
  load_tile<Tile::kOwned, kRowBytes, kThreads>(smem.v, v, first_key, 0, length_k);
  cp_async_commit_group();
  if (visits > 0) load_queries(0);

  float sums[kDv + 1][kM][kD][4];
#pragma unroll
  for (int i = 0; i <= kDv; ++i) set_zero(sums[i]);
#pragma unroll 1
  for (int index = 0; index < p.group * visits; ++index) {
    cp_async_wait_group<0>();
    __syncthreads();
    if (index + 1 < p.group * visits) load_queries(index + 1);
    const Visit visit = walk.visit(index % visits);
    const int stage = index % 2;
    head.head = kv_head * p.group + index / visits;
    const Place<true> place{visit.first, first_key + warp_row};
    float scores[kM][kN][4], dweights[kM][kN][4];
    set_zero(scores);
    set_zero(dweights);
    multiply_rows<Element, kRowBytes>(scores, smem.k, warp_row, smem.q[stage], p.is_exact);
    if (makes_dk)
      multiply_rows<Element, kRowBytes>(dweights, smem.v, warp_row, smem.dout[stage], p.is_exact);
    const Seen<!kFeatures> seen{make_gradients<kFeatures, false>(
        p, head, place, visit.is_cut, scores, dweights, [&](int, int n, int e) {
          const int query = place.row(0, n, e);
          return Statistics{smem.lse_log2[stage][query], smem.delta[stage][query]};
        })};
    if constexpr (kIsSplit<Tile>) {
      if (makes_dv)
        for_each<kM, kN>([&](int i, int n, int e) { dweights[i][n][e] = scores[i][n][e]; });
      multiply_weights<Element, kRowBytes>(
          sums[0], dweights, makes_dk ? smem.q[stage] : smem.dout[stage], p.is_exact, seen);
    } else {
      multiply_weights<Element, kRowBytes>(sums[1], scores, smem.dout[stage], p.is_exact, seen);
      multiply_weights<Element, kRowBytes>(sums[0], dweights, smem.q[stage], p.is_exact, seen);
    }
  }

  cp_async_wait_group<0>();  // of the keys, where nothing was visited
  __syncthreads();
#pragma unroll
  for (int i = 0; i <= kDv; ++i) {
    // Of a block with both sums dk is the first, and dv the second.
    const bool is_dk = kIsSplit<Tile> ? makes_dk : i == 0;
    float factors[kM][2];
    set_all(factors, is_dk ? p.scale : p.dropout.scale);
    const Rows rows = rows_of<Element>(is_dk ? p.dk : p.dv, head.batch, kv_head, start,
                                       is_dk ? p.head_dim : p.value_dim);
    unsigned char* const tile = is_dk ? smem.k : smem.v;
    lay_out<Element, kRowBytes>(tile, warp_row, sums[i], factors);
    write_rows<Element, kRowBytes, 16 * kM>(tile, warp_row, rows, first_key + warp_row, length_k);
  }
}

template <typename Tile, typename Element, bool kFeatures>
cudaError_t launch_backward_keys(const AttentionBackward& p, cudaStream_t stream) {
  using Storage = KeysStorage<Tile, Element>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const int blocks = divide_up(p.max_seqlen_k, Tile::kOwned) * p.sequences * (p.heads / p.group);
  const dim3 grid(static_cast<unsigned>(blocks), kIsSplit<Tile> ? 2 : 1);
  return launch(attention_backward_keys_kernel<Tile, Element, kFeatures>, grid, Tile::kThreads,
                sizeof(Storage), stream, p);
}

template <typename Element>
cudaError_t backward_keys_of(const AttentionBackward& p, cudaStream_t stream) {
  return with_features<Element>(p, [&](auto features) {
    constexpr bool kFeatures = decltype(features)::value;
    using Table = Tiles<Element, kFeatures>;
    const int columns = max(p.head_dim, p.value_dim);
    if (columns <= 64)
      return launch_backward_keys<typename Table::Keys64, Element, kFeatures>(p, stream);
    if (columns <= 128)
      return launch_backward_keys<typename Table::Keys128, Element, kFeatures>(p, stream);
    return launch_backward_keys<typename Table::Keys256, Element, kFeatures>(p, stream);
  });
}

}  // namespace llmkernels::attention

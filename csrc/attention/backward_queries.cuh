// dq: a block owns queries of one head and walks over the keys that some of them see.
#pragma once

#include "gradients.cuh"

namespace llmkernels::attention {

template <typename Tile, typename Element>
struct alignas(128) QueriesStorage {
  static constexpr int kRowBytes = Tile::kHeadDim * kElementBytes<Element>;
  unsigned char q[Tile::kOwned * kRowBytes];  // in the end a warp's rows of dq
  unsigned char dout[Tile::kOwned * kRowBytes];
  unsigned char k[2][Tile::kWalked * kRowBytes];
  unsigned char v[2][Tile::kWalked * kRowBytes];
};

// dq = scale dS k. Blocks and stages as in the forward kernel.
template <typename Tile, typename Element, bool kFeatures>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_queries_kernel(const __grid_constant__ AttentionBackward p) {
  using Storage = QueriesStorage<Tile, Element>;
  constexpr int kRowBytes = Storage::kRowBytes, kM = Tile::kRowTiles, kThreads = Tile::kThreads;
  constexpr int kD = Tile::kHeadDim / 8, kN = Tile::kWalked / 8;
  LLMKERNELS_SHARED(shared);
  Storage& smem = *reinterpret_cast<Storage*>(shared);
  const int block = static_cast<int>(blockIdx.x);
  const Head head = head_of_queries<Tile::kOwned>(p, block);
  const int first_query = first_owned_query<Tile::kOwned>(p, block);
  if (first_query >= head.queries.length) return;
  const int kv_head = head.head / p.group, start = head.queries.start;
  const Rows q = rows_of<Element>(p.q, head.batch, head.head, start, p.head_dim);
  const Rows dout = rows_of<Element>(p.dout, head.batch, head.head, start, p.value_dim);
  const auto walk = walk_over_keys<Tile::kWalked, Tile::kOwned>(p, head, first_query);
  const int visits = walk.visits, length_q = head.queries.length;
  const int warp_row = warp_id<Tile::kWarps>() * 16 * kM;

  const auto load_keys = [&](int index) {
    const int first = walk.visit(index).first;
    const Rows k = rows_of<Element>(p.k, head.batch, kv_head, head.keys.start, p.head_dim);
    const Rows v = rows_of<Element>(p.v, head.batch, kv_head, head.keys.start, p.value_dim);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.k[index % 2], k, first, 0, head.keys.length);
    load_tile<Tile::kWalked, kRowBytes, kThreads>(smem.v[index % 2], v, first, 0, head.keys.length);
    cp_async_commit_group();
  };
  load_tile<Tile::kOwned, kRowBytes, kThreads>(smem.q, q, first_query, 0, length_q);
  load_tile<Tile::kOwned, kRowBytes, kThreads>(smem.dout, dout, first_query, 0, length_q);
  cp_async_commit_group();
  if (visits > 0) load_keys(0);

  const RowStatistics<kM> statistics(p, head, first_query + warp_row);
  float sums[kM][kD][4];
  set_zero(sums);
#pragma unroll 1
  for (int index = 0; index < visits; ++index) {
    cp_async_wait_group<0>();
    __syncthreads();
    if (index + 1 < visits) load_keys(index + 1);
    const Visit visit = walk.visit(index);
    const Place<false> place{first_query + warp_row, visit.first};
    unsigned char* const k_tile = smem.k[index % 2];
    float scores[kM][kN][4], dweights[kM][kN][4];
    set_zero(scores);
    set_zero(dweights);
    multiply_rows<Element, kRowBytes>(scores, smem.q, warp_row, k_tile, p.is_exact);
    multiply_rows<Element, kRowBytes>(dweights, smem.dout, warp_row, smem.v[index % 2], p.is_exact);
    make_gradients<kFeatures, false>(p, head, place, visit.is_cut, scores, dweights, statistics);
    // Keys that are NaN have made what sees them NaN already; the others' weights of 0 must not
    // meet them.
    if (visit.is_cut) drop_nonfinite<Element, sizeof smem.k[0], kThreads>(k_tile);
    multiply_weights<Element, kRowBytes>(sums, dweights, k_tile, p.is_exact, Seen<true>{});
  }

  cp_async_wait_group<0>();  // of the queries, where nothing was visited
  __syncthreads();
  float factors[kM][2];
  set_all(factors, p.scale);
  const Rows dq = rows_of<Element>(p.dq, head.batch, head.head, start, p.head_dim);
  lay_out<Element, kRowBytes>(smem.q, warp_row, sums, factors);
  write_rows<Element, kRowBytes, 16 * kM>(smem.q, warp_row, dq, first_query + warp_row, length_q);
}

template <typename Tile, typename Element, bool kFeatures>
cudaError_t launch_backward_queries(const AttentionBackward& p, cudaStream_t stream) {
  using Storage = QueriesStorage<Tile, Element>;
  static_assert(sizeof(Storage) <= kMaxSharedBytes);
  const int blocks = divide_up(p.max_seqlen_q, Tile::kOwned) * p.sequences * p.heads;
  return launch(attention_backward_queries_kernel<Tile, Element, kFeatures>,
                static_cast<unsigned>(blocks), Tile::kThreads, sizeof(Storage), stream, p);
}

template <typename Element>
cudaError_t backward_queries_of(const AttentionBackward& p, cudaStream_t stream) {
  return with_features<Element>(p, [&](auto features) {
    constexpr bool kFeatures = decltype(features)::value;
    using Table = Tiles<Element, kFeatures>;
    const int columns = max(p.head_dim, p.value_dim);
    if (columns <= 64)
      return launch_backward_queries<typename Table::Queries64, Element, kFeatures>(p, stream);
    if (columns <= 128)
      return launch_backward_queries<typename Table::Queries128, Element, kFeatures>(p, stream);
    return launch_backward_queries<typename Table::Queries256, Element, kFeatures>(p, stream);
  });
}

}  // namespace llmkernels::attention

// dbias: a block owns a tile of it and walks over all that the tile was broadcast over; the scores
// are in registers only.
#pragma once

#include "gradients.cuh"

namespace llmkernels::attention {

template <typename Element>
struct alignas(128) BiasStorage {
  static constexpr int kRowBytes = kBiasColumns * kElementBytes<Element>;
  unsigned char rows[2][kBiasQueries * kRowBytes];  // of q or dout; in the end the tile of dbias
  unsigned char columns[2][kBiasKeys * kRowBytes];  // of k or v
};

// The tiles of scores that share a tile of the bias: queries low_query.., keys low_key.., of
// ``pairs`` batches and heads each.
struct BiasWalk {
  int batch, head;  // of the bias
  int own_query, own_key;
  int low_query, low_key, across, tiles, pairs;

  __device__ __forceinline__ BiasWalk(const AttentionBackward& p, int block) {
    const int all_m = divide_up(p.length_q, kBiasQueries);
    const int all_n = divide_up(p.length_k, kBiasKeys);
    const int own_m = p.is_bias_row ? 1 : all_m, own_n = p.is_bias_column ? 1 : all_n;
    const int offset = p.is_bottom_right ? p.length_k - p.length_q : 0;
    own_key = block % own_n * kBiasKeys;
    own_query = block / own_n % own_m * kBiasQueries;
    batch = block / own_n / own_m / p.bias_heads;
    head = block / own_n / own_m % p.bias_heads;
    low_query = low_key = 0;
    int high_query = all_m * kBiasQueries, high_key = all_n * kBiasKeys;
    if (!p.is_bias_row) {
      const int last = min(own_query + kBiasQueries, p.length_q) - 1;
      const Walk<kBiasKeys> walk(own_query + offset, last + offset, p.left, p.right, p.length_k,
                                 true);
      low_key = walk.low, high_key = walk.high();
      low_query = own_query, high_query = own_query + kBiasQueries;
    } else if (!p.is_bias_column) {
      const int last = min(own_key + kBiasKeys, p.length_k) - 1;
      const Walk<kBiasQueries> walk(own_key - offset, last - offset, p.right, p.left, p.length_q,
                                    true);
      low_query = walk.low, high_query = walk.high();
    }
    if (!p.is_bias_column) {
      high_key = low_key <= own_key && own_key < high_key ? own_key + kBiasKeys : own_key;
      low_key = own_key;
    }
    across = (high_key - low_key) / kBiasKeys;
    tiles = (high_query - low_query) / kBiasQueries * across;
    pairs = p.batches / p.bias_batches * (p.heads / p.bias_heads);
  }

  // The place of a tile and the head it is of; a dimension is either the bias' own or shared.
  __device__ __forceinline__ Place<false> place(const AttentionBackward& p, int index,
                                                Head& shared) const {
    const int sharing_heads = p.heads / p.bias_heads, pair = index / tiles, tile = index % tiles;
    shared = make_head(p, batch + pair / sharing_heads, head + pair % sharing_heads);
    return {low_query + tile / across * kBiasQueries, low_key + tile % across * kBiasKeys};
  }
};

__device__ __forceinline__ void store_bias(void* data, BiasKind kind, int64_t index, float value) {
  if (kind == BiasKind::kFloat32) {
    static_cast<float*>(data)[index] = value;
  } else {
    const uint32_t pair = kind == BiasKind::kBFloat16 ? pack_pair<BFloat16>(value, 0.0f)
                                                      : pack_pair<Float16>(value, 0.0f);
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(pair);
  }
}

// dbias = P (dP - delta), summed over all that share an element of the bias. Block ``tile + tiles *
// (batch * bias heads + head)``, all of the bias. A step adds the products of some columns, first
// of q and k, then of dout and v; stages as in the forward kernel.
template <typename Element>
__global__ void __launch_bounds__(32 * kBiasWarps)
    attention_backward_bias_kernel(const __grid_constant__ AttentionBackward p) {
  using Storage = BiasStorage<Element>;
  constexpr int kRowBytes = Storage::kRowBytes, kThreads = 32 * kBiasWarps, kN = kBiasKeys / 8;
  LLMKERNELS_SHARED(shared);
  Storage& smem = *reinterpret_cast<Storage*>(shared);
  const BiasWalk walk(p, static_cast<int>(blockIdx.x));
  const int warp_row = warp_id<kBiasWarps>() * 16;
  const int score_steps = divide_up(p.head_dim, kBiasColumns);
  const int steps = score_steps + divide_up(p.value_dim, kBiasColumns);
  const int total = walk.pairs * walk.tiles * steps;

  const auto load_step = [&](int index) {
    const bool of_scores = index % steps < score_steps;
    const int part = of_scores ? index % steps : index % steps - score_steps;
    const int width = (of_scores ? p.head_dim : p.value_dim) - part * kBiasColumns;
    Head head;
    const Place<false> place = walk.place(p, index / steps, head);
    Rows rows = rows_of<Element>(of_scores ? p.q : p.dout, head.batch, head.head, 0, width);
    Rows columns =
        rows_of<Element>(of_scores ? p.k : p.v, head.batch, head.head / p.group, 0, width);
    rows.data += part * kRowBytes;
    columns.data += part * kRowBytes;
    load_tile<kBiasQueries, kRowBytes, kThreads>(smem.rows[index % 2], rows, place.first_query, 0,
                                                 p.length_q);
    load_tile<kBiasKeys, kRowBytes, kThreads>(smem.columns[index % 2], columns, place.first_key, 0,
                                              p.length_k);
    cp_async_commit_group();
  };
  if (total > 0) load_step(0);

  float sums[1][kN][4], scores[1][kN][4], dweights[1][kN][4];
  set_zero(sums);
  set_zero(scores);
  set_zero(dweights);
#pragma unroll 1
  for (int index = 0; index < total; ++index) {
    cp_async_wait_group<0>();
    __syncthreads();
    if (index + 1 < total) load_step(index + 1);
    const unsigned char *rows = smem.rows[index % 2], *columns = smem.columns[index % 2];
    if (index % steps < score_steps) {
      multiply_rows<Element, kRowBytes>(scores, rows, warp_row, columns, p.is_exact);
    } else {
      multiply_rows<Element, kRowBytes>(dweights, rows, warp_row, columns, p.is_exact);
    }
    if (index % steps + 1 < steps) continue;
    Head head;
    Place<false> place = walk.place(p, index / steps, head);
    place.first_query += warp_row;
    const RowStatistics<1> statistics(p, head, place.first_query);
    make_gradients<true, true>(p, head, place, true, scores, dweights, statistics);
    for_each<1, kN>([&](int i, int n, int e) { sums[i][n][e] += dweights[i][n][e]; });
    set_zero(scores);
    set_zero(dweights);
  }

  // Through shared memory, where one thread adds up what a broadcast row or column gathers.
  __syncthreads();
  float (*tile)[kBiasKeys] = reinterpret_cast<float (*)[kBiasKeys]>(smem.rows[0]);
  static_assert(sizeof smem.rows >= kBiasQueries * kBiasKeys * sizeof(float));
  for_each<1, kN>([&](int i, int n, int e) {
    tile[warp_row + accumulator_row(e)][8 * n + accumulator_column(e)] = sums[i][n][e];
  });
  __syncthreads();
  const int height = p.is_bias_row ? 1 : min(p.length_q - walk.own_query, kBiasQueries);
  const int width = p.is_bias_column ? 1 : min(p.length_k - walk.own_key, kBiasKeys);
  const int added_rows = p.is_bias_row ? kBiasQueries : 1;
  const int added_columns = p.is_bias_column ? kBiasKeys : 1;
  const int64_t bias_rows = p.is_bias_row ? 1 : p.length_q;
  const int64_t bias_columns = p.is_bias_column ? 1 : p.length_k;
  const int64_t first_row =
      (int64_t{walk.batch} * p.bias_heads + walk.head) * bias_rows + walk.own_query;
  for (int index = static_cast<int>(threadIdx.x); index < height * width; index += kThreads) {
    const int m = index / width, n = index % width;
    float sum = 0.0f;
    for (int row = 0; row < added_rows; ++row)
      for (int column = 0; column < added_columns; ++column) sum += tile[m + row][n + column];
    store_bias(p.dbias, p.bias.kind, (first_row + m) * bias_columns + walk.own_key + n, sum);
  }
}

template <typename Element>
cudaError_t backward_bias_of(const AttentionBackward& p, cudaStream_t stream) {
  static_assert(sizeof(BiasStorage<Element>) <= kMaxSharedBytes);
  const int tiles_m = p.is_bias_row ? 1 : divide_up(p.length_q, kBiasQueries);
  const int tiles_n = p.is_bias_column ? 1 : divide_up(p.length_k, kBiasKeys);
  return launch(attention_backward_bias_kernel<Element>,
                static_cast<unsigned>(tiles_m * tiles_n * p.bias_batches * p.bias_heads),
                32 * kBiasWarps, sizeof(BiasStorage<Element>), stream, p);
}

}  // namespace llmkernels::attention

// The gradients of a tile of scores, made again from the logsumexp: what the kernels of backward
// have in common.
#pragma once

#include "../common/launch.cuh"
#include "launchers.h"
#include "logits.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "tiles.h"

namespace llmkernels::attention {

// lse_log2 and delta of one query.
struct Statistics {
  float lse_log2, delta;
};

// Those of the rows g and g + 8 of each 16 queries of a warp.
template <int kM>
struct RowStatistics {
  Statistics rows[kM][2];

  __device__ __forceinline__ RowStatistics(const AttentionBackward& p, const Head& head,
                                           int first_query) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first_query + 16 * i + accumulator_row(2 * half);
        rows[i][half] = {0.0f, 0.0f};
        if (query < head.queries.length) {
          const int64_t row = row_number(p, head, query);
          rows[i][half] = {p.lse_log2[row], p.delta[row]};
        }
      }
    }
  }

  __device__ __forceinline__ Statistics operator()(int i, int, int e) const {
    return rows[i][e / 2];
  }
};

// Scores become the weights that dropout keeps, not yet scaled, and dweights, dout v^T, the
// gradients of the logits before scale: P (dP - delta) (1 - tanh^2), or if kOfLogits, as a bias has
// them, without the soft cap's factor. What is hidden is 0 whatever stands in these. statistics(i,
// n, e): of the element's query. Returns which columns the warp's rows see, as Seen has them; all
// without a bias, which alone hides what loads don't know of.
template <bool kFeatures, bool kOfLogits, bool kTransposed, int kM, int kN, typename Query>
__device__ __forceinline__ uint32_t make_gradients(const AttentionBackward& p, const Head& head,
                                                   const Place<kTransposed>& place, bool is_cut,
                                                   float (&scores)[kM][kN][4],
                                                   float (&dweights)[kM][kN][4], Query statistics) {
  const float factor = logit_factor<kFeatures>(p);
  const float kept_scale = kFeatures ? p.dropout.scale : 1.0f;
  float capped[kM][kN][4];
  uint32_t seen = 0xffffffffu;
  if constexpr (kFeatures) add_features(p, head, place, scores, capped);
  if (is_cut) hide(p, head, place, scores);
  if (kFeatures && kTransposed && p.bias.data != nullptr) {
    seen = 0;
    for_each<kM, kN>([&](int i, int n, int e) {
      if (scores[i][n][e] != -INFINITY) seen |= 1u << (2 * n + e % 2);
    });
#pragma unroll
    for (int lanes = 4; lanes < kWarpThreads; lanes *= 2)
      seen |= __shfl_xor_sync(kFullWarp, seen, lanes);
  }
  const auto finish = [&](int i, int n, int e, bool is_kept) {
    const bool is_hidden = scores[i][n][e] == -INFINITY;
    const Statistics query = statistics(i, n, e);
    const float weight = ex2_approx_ftz_f32(fmaf(scores[i][n][e], factor, -query.lse_log2));
    const float dweight = is_kept ? dweights[i][n][e] * kept_scale : 0.0f;
    float gradient = weight * (dweight - query.delta);
    if constexpr (kFeatures && !kOfLogits) {
      if (p.softcap > 0.0f) gradient *= 1.0f - capped[i][n][e] * capped[i][n][e];
    }
    dweights[i][n][e] = is_hidden ? 0.0f : gradient;
    scores[i][n][e] = is_hidden || !is_kept ? 0.0f : weight;
  };
  if (kFeatures && p.dropout.seed != nullptr) {
    for_each_kept<kTransposed, kM, kN>(p, head, place, finish);
  } else {
    for_each<kM, kN>([&](int i, int n, int e) { finish(i, n, e, true); });
  }
  return seen;
}

template <int kM>
__device__ __forceinline__ void set_all(float (&factors)[kM][2], float value) {
#pragma unroll
  for (int i = 0; i < kM; ++i) factors[i][0] = factors[i][1] = value;
}

}  // namespace llmkernels::attention

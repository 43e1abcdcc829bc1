// From the products of queries and keys to logits in base 2, in the registers of a warp.
#pragma once

#include <cmath>

#include "../common/math.cuh"
#include "../sm80/dropout_fragments.cuh"
#include "../sm80/fragments.cuh"
#include "walk.cuh"

namespace llmkernels::attention {

// Which query and key the elements of a warp's scores belong to: element (i, n, e) is element e of
// accumulator n of the i-th 16 rows. Rows are queries, or if kTransposed keys.
template <bool kTransposed>
struct Place {
  int first_query, first_key;

  __device__ __forceinline__ int query(int i, int n, int e) const {
    return first_query + row(i, n, e);
  }
  __device__ __forceinline__ int key(int i, int n, int e) const {
    return first_key + column(i, n, e);
  }

  // Of the tile of queries by keys, whichever of them the accumulators' rows are.
  __device__ __forceinline__ static int row(int i, int n, int e) {
    return kTransposed ? 8 * n + accumulator_column(e) : 16 * i + accumulator_row(e);
  }
  __device__ __forceinline__ static int column(int i, int n, int e) {
    return kTransposed ? 16 * i + accumulator_row(e) : 8 * n + accumulator_column(e);
  }
};

// Calls action(i, n, e) for every element.
template <int kM, int kN, typename Action>
__device__ __forceinline__ void for_each(Action action) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) action(i, n, e);
}

// -inf wherever the window or the end of the keys hides the key. Of queries beyond the last nothing
// is kept, or zeros are loaded. All that depends on the row alone comes from the tile's own
// numbers, so that the compiler has no bounds of rows to keep in registers from one tile to the
// next.
template <bool kTransposed, int kM, int kN>
__device__ __forceinline__ void hide(const Attention& p, const Head& head,
                                     const Place<kTransposed>& place, float (&scores)[kM][kN][4]) {
  const int first_distance = place.first_key - place.first_query - head.offset;
  for_each<kM, kN>([&](int i, int n, int e) {
    const int distance = first_distance + place.column(i, n, e) - place.row(i, n, e);
    if (distance < -p.left || distance > p.right || place.key(i, n, e) >= head.keys.length)
      scores[i][n][e] = -INFINITY;
  });
}

__device__ __forceinline__ float bias_value(const float* bias, int offset) { return bias[offset]; }

template <typename Element>
struct Half {
  uint16_t bits;
};

template <typename Element>
__device__ __forceinline__ float bias_value(const Half<Element>* bias, int offset) {
  return unpack_pair<Element>(bias[offset].bits).x;
}

__device__ __forceinline__ float bias_value(const uint8_t* bias, int offset) {
  return bias[offset] != 0 ? 0.0f : -INFINITY;
}

// Calls action with the bias as a pointer of its kind, at query and key 0 of the head.
template <typename Action>
__device__ __forceinline__ void with_bias(const Attention& p, const Head& head, int query, int key,
                                          Action action) {
  const Bias& bias = p.bias;
  const int64_t offset = head.batch * bias.batch_stride + head.head * bias.head_stride +
                         query * bias.row_stride + key * bias.column_stride;
  if (bias.kind == BiasKind::kFloat32) {
    action(static_cast<const float*>(bias.data) + offset);
  } else if (bias.kind == BiasKind::kBFloat16) {
    action(static_cast<const Half<BFloat16>*>(bias.data) + offset);
  } else if (bias.kind == BiasKind::kFloat16) {
    action(static_cast<const Half<Float16>*>(bias.data) + offset);
  } else {
    action(static_cast<const uint8_t*>(bias.data) + offset);
  }
}

template <bool kTransposed, int kM, int kN>
__device__ __forceinline__ void add_bias(const Attention& p, const Head& head,
                                         const Place<kTransposed>& place,
                                         float (&logits)[kM][kN][4]) {
  const int row_stride = static_cast<int>(p.bias.row_stride);
  const int column_stride = static_cast<int>(p.bias.column_stride);
  with_bias(p, head, place.first_query, place.first_key, [&](const auto* bias) {
    for_each<kM, kN>([&](int i, int n, int e) {
      const bool inside =
          place.query(i, n, e) < head.queries.length && place.key(i, n, e) < head.keys.length;
      const int offset = place.row(i, n, e) * row_stride + place.column(i, n, e) * column_stride;
      const float value = inside ? bias_value(bias, offset) : -INFINITY;
      // -inf hides the key even where its logit is NaN.
      logits[i][n][e] = value == -INFINITY ? value : logits[i][n][e] + value * kLog2E;
    });
  });
}

// Whether the query sees the key, for the few that are asked about one by one.
__device__ __forceinline__ bool is_visible(const Attention& p, const Head& head, int query,
                                           int key) {
  bool visible = is_in_window(p, head, query, key);
  if (p.bias.data != nullptr && visible) {
    with_bias(p, head, query, key,
              [&](const auto* bias) { visible = bias_value(bias, 0) != -INFINITY; });
  }
  return visible;
}

// What scores are multiplied by to become logits in base 2. Calls without features leave that to
// the exponential, one instruction with its subtraction; their scale is positive, so that -inf and
// the maximum stay what they are.
template <bool kFeatures>
__device__ __forceinline__ float logit_factor(const Attention& p) {
  return kFeatures ? 1.0f : p.scale * kLog2E;
}

// Scores become logits: soft cap, ALiBi, bias. capped: tanh(scale score / softcap), where there is
// a cap.
template <bool kTransposed, int kM, int kN>
__device__ __forceinline__ void add_features(const Attention& p, const Head& head,
                                             const Place<kTransposed>& place,
                                             float (&scores)[kM][kN][4],
                                             float (&capped)[kM][kN][4]) {
  if (p.softcap > 0.0f) {
    const float inner = p.scale / p.softcap, outer = p.softcap * kLog2E;
    for_each<kM, kN>([&](int i, int n, int e) {
      capped[i][n][e] = tanhf(scores[i][n][e] * inner);
      scores[i][n][e] = capped[i][n][e] * outer;
    });
  } else {
    const float factor = p.scale * kLog2E;
    for_each<kM, kN>([&](int i, int n, int e) { scores[i][n][e] *= factor; });
  }
  if (p.slopes != nullptr) {
    const int64_t row = int64_t{head.sequence} * p.slope_stride;
    const float slope_log2 = p.slopes[row + head.head] * kLog2E;
    for_each<kM, kN>([&](int i, int n, int e) {
      const int distance = place.query(i, n, e) + head.offset - place.key(i, n, e);
      scores[i][n][e] -= slope_log2 * fabsf(static_cast<float>(distance));
    });
  }
  if (p.bias.data != nullptr) add_bias(p, head, place, scores);
}

// Calls action(i, n, e, is_kept) for every element.
template <bool kTransposed, int kM, int kN, typename Action>
__device__ __forceinline__ void for_each_kept(const Attention& p, const Head& head,
                                              const Place<kTransposed>& place, Action action) {
  const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
  const uint32_t threshold = p.dropout.threshold, quads = quads_of_row(p.max_seqlen_k);
  const uint64_t first =
      quad_counter(row_number(p, head, place.first_query), quads, place.first_key);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t kept;
      if constexpr (kTransposed) {
        const uint64_t counter = first + uint64_t{quads} * (8 * n) + 4 * i;
        kept = kept_8x16_trans(seed, threshold, counter, quads) |
               kept_8x16_trans(seed, threshold, counter + uint64_t{quads} * 8, quads) << 4;
      } else {
        const uint64_t counter = first + uint64_t{quads} * (16 * i) + 2 * n;
        kept = kept_16x16(seed, threshold, counter, quads);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) action(i, n + e / 4, e % 4, (kept >> e & 1) != 0);
    }
  }
}

}  // namespace llmkernels::attention

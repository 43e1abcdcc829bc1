// The activations and their derivatives (formulas: reference.activate in reference.py).
#pragma once

#include "../common/math.cuh"
#include "feed_forward.h"

namespace llmkernels {

struct Activated {
  float value;
  float slope;
};

// s = sigmoid(v) and s * (1 - s), to float32 accuracy for any v: neither 1 - s nor an overflow is
// in them.
__device__ __forceinline__ Activated sigmoid(float v) {
  const float e = ex2_approx_ftz_f32(-kLog2E * fabsf(v));
  const float inverse = rcp_approx_ftz_f32(1.0f + e);
  return {v < 0.0f ? e * inverse : inverse, e * inverse * inverse};
}

// Whichever of the two the caller does not use is not computed. ``activation`` is uniform over the
// grid.
__device__ __forceinline__ Activated activate(Activation activation, float x) {
  if (activation == Activation::kRelu) return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  // Beyond it every activation has reached its limit, and no power of it overflows. NaN passes.
  constexpr float kSaturation = 1000.0f;
  const float above = x < -kSaturation ? -kSaturation : x;
  const float inside = above > kSaturation ? kSaturation : above;
  float share, slope;
  if (activation == Activation::kGelu) {
    constexpr float kDensityAt0 = 0.3989422804014327f;  // of the normal distribution
    share = 0.5f + 0.5f * erff(inside * kSqrtHalf);
    slope = share + inside * kDensityAt0 * ex2_approx_ftz_f32(-0.5f * kLog2E * inside * inside);
  } else if (activation == Activation::kGeluTanh) {
    constexpr float kScale = 1.5957691216057308f;  // 2 sqrt(2 / pi): 1 + tanh(u) = 2 sigmoid(2 u)
    const float cubic = 0.044715f * inside * inside;
    const Activated s = sigmoid(kScale * inside * (1.0f + cubic));
    share = s.value;
    slope = share + inside * s.slope * kScale * (1.0f + 3.0f * cubic);
  } else {
    const Activated s = sigmoid(inside);
    share = s.value;
    slope = share + inside * s.slope;
  }
  // Of -inf the limit, 0, and not -inf * 0; +inf stays.
  return {above * share, slope};
}

}  // namespace llmkernels

// LayerNorm, residual + dropout + LayerNorm and RMSNorm: what the host hands to the kernels.
// Formulas, shapes and the dropout stream are those of llmkernels/ops/layer_norm/reference.py.
#pragma once

#include "../common/platform.cuh"

#include "../common/dropout.h"
#include "../common/dtype.h"

namespace llmkernels {

// z = residual + dropout(x), rounded to z's dtype (z = x without a residual); y = (z - mean) * rstd
// * weight + bias.
struct LayerNormForward {
  Matrix x;               // [M, N]
  Matrix residual;        // [M, N] or null
  Matrix weight;          // [N] or null
  Matrix bias;            // [N] or null
  Matrix z;               // [M, N] where there is a residual, else null
  Matrix y;               // [M, N]
  float* mean = nullptr;  // [M]; null says RMSNorm
  float* rstd = nullptr;  // [M]
  Dropout dropout;        // of x, where there is a residual
  int64_t m = 0;
  int32_t n = 0;
  float eps = 0.0f;
  bool keeps_row = false;  // set by the launcher: the looped kernel holds z in shared memory
};

// With xhat = (z - mean) * rstd, g = dy * weight and means over a row:
//   total     = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dz        (RMSNorm: without mean(g))
//   dx        = dropout(total), dresidual = total
//   dweight   = sum over rows of dy * xhat, dbias = sum over rows of dy
// A gradient that is not wanted is null: it is then neither computed nor written.
struct LayerNormBackward {
  Matrix dy;                    // [M, N]
  Matrix dz;                    // [M, N] or null
  Matrix z;                     // [M, N]
  Matrix weight;                // [N] or null
  const float* mean = nullptr;  // [M]; null says RMSNorm
  const float* rstd = nullptr;  // [M]
  Matrix dx;                    // [M, N] or null
  Matrix dresidual;             // [M, N] or null; only beside dx
  Matrix dweight;               // [N] or null
  Matrix dbias;                 // [N] or null
  Matrix dweight_partial;       // float32 [partial_rows, N] where dweight is wanted
  Matrix dbias_partial;         // float32 [partial_rows, N] where dbias is wanted
  Dropout dropout;
  int64_t m = 0;
  int32_t n = 0;
  int32_t partial_rows = 0;  // as layer_norm_partial_rows says
};

// Launch on the current device. M and N are at least 1. Errors are CUDA's own.
cudaError_t layer_norm_forward(const LayerNormForward& arguments, cudaStream_t stream);
cudaError_t layer_norm_backward(const LayerNormBackward& arguments, cudaStream_t stream);

// Rows of the partial sums that backward of [m, n] in z's dtype wants on the current device. It
// depends on nothing else, so that gradients are bitwise reproducible on one kind of GPU.
cudaError_t layer_norm_partial_rows(int64_t m, int32_t n, Dtype dtype, int32_t* partial_rows);

}  // namespace llmkernels

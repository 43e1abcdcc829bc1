// Linear layer + activation: what the host hands to the kernels. Formulas, shapes and the dropout
// stream are those of llmkernels/ops/feed_forward/reference.py.
#pragma once

#include "../common/platform.cuh"

#include "../common/dropout.h"
#include "../common/dtype.h"

namespace llmkernels {

enum class Activation : int32_t { kRelu = 0, kGelu = 1, kGeluTanh = 2, kSilu = 3 };

// a b, of one dtype. Paired: the columns of b are two halves of N, gate and up, and a tile of the
// result is made of the same columns of either.
struct Product {
  Matrix a;  // [M, K]
  Matrix b;  // [N, K] where b_along_k, else [K, N]; paired [2 N, K] or [K, 2 N]
  bool b_along_k = false;
  bool paired = false;
  bool tf32 = false;  // float32 operands may be rounded to tf32
  int64_t m = 0;
  int32_t n = 0;
  int32_t k = 0;
  // Set by the launcher: bytes of one copy to shared memory, as the operand's alignment has it.
  int32_t a_copy_bytes = 0;
  int32_t b_copy_bytes = 0;
};

// pre = a b + bias, rounded to the dtype; hidden = dropout(act(pre)), paired: dropout(act(gate) *
// up). Of the two a null one is not written.
struct LinearActivationForward {
  Product product;  // x [M, K] and the weight
  Matrix bias;      // [N], paired [2 N], or null
  Matrix pre;       // [M, N], paired [M, 2 N], or null
  Matrix hidden;    // [M, N] or null
  Dropout dropout;
  Activation activation = Activation::kRelu;
  bool is_vector = false;  // set by the launcher: four columns are one access
};

// dhidden = dropout(a b), without a weight dropout(a); dpre = dhidden * act'(pre), gated: dgate =
// dhidden * up * act'(gate) and dup = dhidden * act(gate) side by side; dbias = sum over rows of
// dpre. What is null is not wanted.
struct LinearActivationBackward {
  Product product;  // dy [M, K] and the weight of the layer that took hidden; b null: dy [M, N]
  Matrix pre;       // [M, N], gated [M, 2 N]
  Matrix dpre;      // as pre, or null
  Matrix hidden;    // [M, N] or null; made again as forward made it
  Matrix dbias;     // [N], gated [2 N], or null
  Matrix dbias_partial;      // float32 [partial_rows, N], gated 2 N, beside dbias
  int32_t partial_rows = 0;  // as linear_activation_partial_rows says
  Dropout dropout;
  Activation activation = Activation::kRelu;
  bool gated = false;
  bool is_vector = false;  // set by the launcher: four columns are one access
};

// Launch on the current device. M and N are at least 1; K may be 0. Errors are CUDA's own.
cudaError_t linear_activation_forward(const LinearActivationForward& arguments,
                                      cudaStream_t stream);
cudaError_t linear_activation_backward(const LinearActivationBackward& arguments,
                                       cudaStream_t stream);

// Rows of the partial sums of dbias on the current device: a function of M, N, the dtype, tf32 and
// whether there is a weight, so that dbias is bitwise reproducible on one kind of GPU.
cudaError_t linear_activation_partial_rows(const Product& product, int32_t* partial_rows);

}  // namespace llmkernels

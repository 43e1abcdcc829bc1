// Softmax attention: what the host hands to the kernels. Formulas, shapes and the dropout stream
// are those of llmkernels/ops/attention/reference.py.
#pragma once

#include "../common/platform.cuh"

#include "../common/dropout.h"
#include "../common/dtype.h"

namespace llmkernels {

// Rows of adjacent columns, of every head. Read operands begin at multiples of 16 bytes in all
// three strides, whatever the number of columns; written ones anywhere.
struct HeadRows {
  void* data = nullptr;  // [B, H, L, D]
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;  // all in elements; this one below 2^29
};

enum class BiasKind : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kBool = 3 };

// Added to the logits, or whether a key is visible. Strides of 0 where it is broadcast; within 256
// rows and columns offsets fit into 32 bits.
struct Bias {
  const void* data = nullptr;  // [B | 1, Hq | 1, Lq | 1, Lk | 1] or null
  BiasKind kind = BiasKind::kFloat32;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// What forward and backward have in common. Query i stands at position i + offset among the keys,
// offset being Lk - Lq if is_bottom_right, else 0, and sees those from left before it to right
// after it. Lengths, left and right are at most 2^30.
struct Attention {
  HeadRows q;                             // [B, Hq, Lq, D]
  HeadRows k;                             // [B, Hkv, Lk, D]
  HeadRows v;                             // [B, Hkv, Lk, Dv]
  Bias bias;                              // null where sequences are packed
  const float* slopes = nullptr;          // [B or sequences, Hq], ALiBi's, or null
  const float* sinks = nullptr;           // [Hq] or null
  const int32_t* cu_seqlens_q = nullptr;  // [sequences + 1] where sequences are packed in B = 1
  const int32_t* cu_seqlens_k = nullptr;  // as cu_seqlens_q
  Dropout dropout;
  Dtype dtype = Dtype::kFloat32;  // of q, k, v and all that lies like them
  bool is_exact = true;           // float32 is multiplied as 3xtf32, not as tf32
  bool is_bottom_right = false;
  int32_t sequences = 0;  // B where they are not packed
  int32_t heads = 0;      // Hq
  int32_t group = 1;      // Hq / Hkv
  int32_t head_dim = 0;
  int32_t value_dim = 0;
  int32_t length_q = 0;  // rows of q, of packed sequences all
  int32_t length_k = 0;
  int32_t max_seqlen_q = 0;  // the longest sequence
  int32_t max_seqlen_k = 0;
  int32_t slope_stride = 0;  // from one sequence to the next
  int32_t left = 0;
  int32_t right = 0;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
};

struct AttentionForward : Attention {
  HeadRows out;          // [B, Hq, Lq, Dv]
  float* lse = nullptr;  // [B, Hq, Lq]
};

// Gradients are written, not added to. dbias is contiguous and of the bias' own sizes.
struct AttentionBackward : Attention {
  HeadRows out;                 // [B, Hq, Lq, Dv]
  HeadRows dout;                // [B, Hq, Lq, Dv]
  const float* lse = nullptr;   // [B, Hq, Lq]
  const float* dlse = nullptr;  // [B, Hq, Lq] or null
  float* lse_log2 = nullptr;    // [B, Hq, Lq], scratch
  float* delta = nullptr;       // [B, Hq, Lq]: rowsum(out dout) - dlse
  HeadRows dq;                  // [B, Hq, Lq, D]
  HeadRows dk;                  // [B, Hkv, Lk, D]
  HeadRows dv;                  // [B, Hkv, Lk, Dv]
  void* dbias = nullptr;        // as the bias, or null
  int32_t batches = 0;          // B
  int32_t bias_batches = 1;     // sizes of the bias
  int32_t bias_heads = 1;
  bool is_bias_row = false;     // one row for all queries
  bool is_bias_column = false;  // one column for all keys
};

// Launch on the current device. Head dims are 1 to 256; lengths and numbers of heads may be 0.
// Errors are CUDA's own.
cudaError_t attention_forward(const AttentionForward& arguments, cudaStream_t stream);
cudaError_t attention_backward(const AttentionBackward& arguments, cudaStream_t stream);

}  // namespace llmkernels

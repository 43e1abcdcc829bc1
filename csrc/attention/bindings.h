// The Python functions of attention.h, without a header of Python: bindings.cpp hands over its
// module, whose tuples of integers come as arrays.
#pragma once

#include "../common/host.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "attention.h"

namespace llmkernels {

using BoundRows = std::array<int64_t, 4>;  // address, strides of batch, head and row
using BoundBias = std::array<int64_t, 6>;  // address, kind, strides of batch, head, row and column
// slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k
using BoundPointers = std::array<uintptr_t, 5>;
// sequences, heads, group, head_dim, value_dim, length_q, length_k, max_seqlen_q, max_seqlen_k,
// slope_stride, left, right, is_bottom_right, dtype, is_exact
using BoundSizes = std::array<int64_t, 15>;
using BoundNumbers = std::array<double, 3>;  // scale, softcap, dropout_p

inline void refuse(const char* name, const char* expected, int64_t limit, int64_t value) {
  std::ostringstream text;
  text << name << ": expected " << expected << " " << limit << ", got " << value;
  throw std::runtime_error(text.str());
}

inline HeadRows head_rows(const BoundRows& rows, const char* name) {
  const auto [data, batch, head, row] = rows;
  constexpr int64_t kMaxStride = int64_t{1} << 29;  // whose bytes have 32 bits
  if (row < 0 || row >= kMaxStride)
    refuse(name, "a row stride of at least 0 and below", kMaxStride, row);
  return {pointer<void>(data), batch, head, row};
}

inline std::ostream& operator<<(std::ostream& text, const HeadRows& rows) {
  return text << rows.data << " with strides " << rows.batch_stride << ", " << rows.head_stride
              << ", " << rows.row_stride;
}

inline void set_attention(Attention& p, const BoundRows& q, const BoundRows& k, const BoundRows& v,
                          const BoundBias& bias, const BoundPointers& pointers,
                          const BoundSizes& sizes, const BoundNumbers& numbers) {
  p.q = head_rows(q, "q");
  p.k = head_rows(k, "k");
  p.v = head_rows(v, "v");
  p.bias = {
      pointer<void>(bias[0]), static_cast<BiasKind>(bias[1]), bias[2], bias[3], bias[4], bias[5]};
  p.slopes = pointer<const float>(pointers[0]);
  p.sinks = pointer<const float>(pointers[1]);
  p.dropout = make_dropout(pointer<const int64_t>(pointers[2]), numbers[2]);
  p.cu_seqlens_q = pointer<const int32_t>(pointers[3]);
  p.cu_seqlens_k = pointer<const int32_t>(pointers[4]);
  constexpr int64_t kMax = int64_t{1} << 30;
  for (const int64_t size : sizes)
    if (size < -kMax || size > kMax) refuse("sizes", "values of at most", kMax, size);
  int32_t* const fields[] = {&p.sequences,    &p.heads,        &p.group,    &p.head_dim,
                             &p.value_dim,    &p.length_q,     &p.length_k, &p.max_seqlen_q,
                             &p.max_seqlen_k, &p.slope_stride, &p.left,     &p.right};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = static_cast<int32_t>(sizes[i]);
  p.is_bottom_right = sizes[12] != 0;
  p.dtype = static_cast<Dtype>(sizes[13]);
  p.is_exact = sizes[14] != 0;
  p.scale = static_cast<float>(numbers[0]);
  p.softcap = static_cast<float>(numbers[1]);
  // Blocks are numbered with 31 bits, and own 16 rows of one head at least.
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  const int64_t of_sequences = (std::max(sizes[7], sizes[8]) / 16 + 1) * sizes[0];
  const int64_t of_tensors = (sizes[5] / 16 + 1) * (p.cu_seqlens_q == nullptr ? sizes[0] : 1);
  const int64_t blocks = std::max(of_sequences, of_tensors) * sizes[1];
  if (blocks > kMaxBlocks) refuse("sizes", "tiles of 16 rows of at most", kMaxBlocks, blocks);
}

inline void check_attention(cudaError_t error, const char* function, const Attention& p,
                            int device) {
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << function << ": " << describe(error) << " on device " << device << ", dtype "
       << static_cast<int>(p.dtype) << ", " << p.sequences << " sequences, " << p.heads
       << " heads in groups of " << p.group << ", head_dim " << p.head_dim << ", value_dim "
       << p.value_dim << ", lengths " << p.length_q << " and " << p.length_k << " (at most "
       << p.max_seqlen_q << " and " << p.max_seqlen_k << "), q " << p.q << ", k " << p.k << ", v "
       << p.v << ", bias " << p.bias.data << ", slopes " << p.slopes << ", sinks " << p.sinks
       << ", seed " << p.dropout.seed;
  throw std::runtime_error(text.str());
}

inline void bound_attention_forward(const BoundRows& q, const BoundRows& k, const BoundRows& v,
                                    const BoundRows& out, uintptr_t lse, const BoundBias& bias,
                                    const BoundPointers& pointers, const BoundSizes& sizes,
                                    const BoundNumbers& numbers, int device, uintptr_t stream) {
  AttentionForward p;
  set_attention(p, q, k, v, bias, pointers, sizes, numbers);
  p.out = head_rows(out, "out");
  p.lse = pointer<float>(lse);
  const DeviceGuard guard(device, "attention_forward");
  const cudaError_t error = attention_forward(p, pointer<CUstream_st>(stream));
  check_attention(error, "attention_forward", p, device);
}

// gradients: dq, dk, dv; statistics: lse, dlse, lse_log2, delta; dbias: address, batches and heads
// of the bias, whether it is one row, whether one column.
inline void bound_attention_backward(const BoundRows& q, const BoundRows& k, const BoundRows& v,
                                     const BoundRows& dout, const BoundRows& out,
                                     const std::array<BoundRows, 3>& gradients,
                                     const std::array<uintptr_t, 4>& statistics,
                                     const std::array<int64_t, 5>& dbias, int batches,
                                     const BoundBias& bias, const BoundPointers& pointers,
                                     const BoundSizes& sizes, const BoundNumbers& numbers,
                                     int device, uintptr_t stream) {
  AttentionBackward p;
  set_attention(p, q, k, v, bias, pointers, sizes, numbers);
  p.dout = head_rows(dout, "dout");
  p.out = head_rows(out, "out");
  p.dq = head_rows(gradients[0], "dq");
  p.dk = head_rows(gradients[1], "dk");
  p.dv = head_rows(gradients[2], "dv");
  p.lse = pointer<const float>(statistics[0]);
  p.dlse = pointer<const float>(statistics[1]);
  p.lse_log2 = pointer<float>(statistics[2]);
  p.delta = pointer<float>(statistics[3]);
  p.dbias = pointer<void>(dbias[0]);
  p.batches = batches;
  p.bias_batches = static_cast<int32_t>(dbias[1]);
  p.bias_heads = static_cast<int32_t>(dbias[2]);
  p.is_bias_row = dbias[3] != 0;
  p.is_bias_column = dbias[4] != 0;
  const DeviceGuard guard(device, "attention_backward");
  const cudaError_t error = attention_backward(p, pointer<CUstream_st>(stream));
  check_attention(error, "attention_backward", p, device);
}

template <typename Module>
void bind_attention(Module& m) {
  m.def("attention_forward", &bound_attention_forward,
        "Launches one forward; operands as csrc/attention/bindings.h.");
  m.def("attention_backward", &bound_attention_backward,
        "Launches one backward; operands as csrc/attention/bindings.h.");
}

}  // namespace llmkernels

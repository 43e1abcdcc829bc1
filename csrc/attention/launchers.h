// The launchers of one kernel each, for one type of q, k and v; each instantiated by .cu files of
// its own so that they compile side by side.
#pragma once

#include <type_traits>

#include "../common/convert.cuh"
#include "attention.h"

namespace llmkernels::attention {

// Whether the call needs the kernels that know of biases, slopes, caps, dropout and scales that are
// not positive.
inline bool has_features(const Attention& p) {
  return p.bias.data != nullptr || p.slopes != nullptr || p.softcap > 0.0f ||
         p.dropout.seed != nullptr || !(p.scale > 0.0f);
}

// Calls action with whether features are wanted, as std::true_type or false_type.
template <typename Element, typename Action>
cudaError_t with_features(const Attention& p, Action action) {
  // Of float32 only the kernels with features exist: it is not where speed is asked for.
  if constexpr (Element::dtype({}) != Dtype::kFloat32) {
    if (!has_features(p)) return action(std::false_type{});
  }
  return action(std::true_type{});
}

template <typename Element>
cudaError_t forward_of(const AttentionForward& p, cudaStream_t stream);
template <typename Element>
cudaError_t backward_delta_of(const AttentionBackward& p, cudaStream_t stream);
template <typename Element>
cudaError_t backward_keys_of(const AttentionBackward& p, cudaStream_t stream);
template <typename Element>
cudaError_t backward_queries_of(const AttentionBackward& p, cudaStream_t stream);
template <typename Element>
cudaError_t backward_bias_of(const AttentionBackward& p, cudaStream_t stream);

}  // namespace llmkernels::attention

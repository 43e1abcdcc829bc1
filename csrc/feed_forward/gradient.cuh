// What backward makes of a quad of the gradient of hidden, wherever that comes from.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "quad.cuh"

namespace llmkernels {

// What is read of pre for a quad of hidden.
struct RawPre {
  Raw<4> gate, up;
};

// Zeros outside of pre.
template <typename Element>
__device__ __forceinline__ RawPre load_pre(const LinearActivationBackward& p, int64_t row,
                                           int column) {
  const int n = row < p.product.m ? p.product.n : 0;
  const QuadView<Element> pre(p.pre, p.is_vector);
  RawPre raw;
  raw.gate = pre.load(row, column, n);
  if (p.gated) raw.up = pre.load(row, p.product.n + column, 2 * n);
  return raw;
}

// What one lane reads of its rows, a row every ``step`` from ``row`` on: load(row), which may be
// past the last. The loads of the next kAhead rows are under way, which the stores in between would
// forbid a compiler to arrange.
template <typename Load>
class RowsAhead {
 public:
  using Loaded = std::invoke_result_t<Load, int64_t>;

  __device__ __forceinline__ RowsAhead(int64_t row, int step, Load load)
      : load_(load), row_(row), step_(step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) start(ahead_[i]);
  }

  __device__ __forceinline__ Loaded next() {
    const Loaded loaded = ahead_[0];
#pragma unroll
    for (int i = 1; i < kAhead; ++i) ahead_[i - 1] = ahead_[i];
    start(ahead_[kAhead - 1]);
    return loaded;
  }

 private:
  static constexpr int kAhead = 3;

  __device__ __forceinline__ void start(Loaded& loaded) {
    loaded = load_(row_);
    row_ += step_;
  }

  Load load_;
  int64_t row_;
  int step_;
  Loaded ahead_[kAhead];
};

// The running sums over rows of dpre, unrounded, of one thread's columns.
struct BiasSums {
  Quad gate = {};
  Quad up = {};
};

// Makes dpre and hidden of a quad of dhidden, and adds dpre to the sums.
template <typename Element>
__device__ __forceinline__ void finish_backward_quad(const LinearActivationBackward& p, int64_t row,
                                                     int column, const RawPre& raw, Quad& dhidden,
                                                     BiasSums& sums) {
  const int n = p.product.n;
  uint32_t kept = 0;
  if (p.dropout.seed != nullptr) {
    kept = kept_by(p.dropout, row, column, n);
    drop(dhidden, kept, p.dropout.scale);
  }
  Quad gate, up, hidden;
  load_quad<Element>(raw.gate, gate);
  if (p.gated) load_quad<Element>(raw.up, up);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Activated activated = activate(p.activation, gate[j]);
    hidden[j] = activated.value;
    gate[j] = dhidden[j];
    if (p.gated) {
      gate[j] *= up[j];
      hidden[j] *= up[j];
      up[j] = dhidden[j] * activated.value;
    }
    // Where relu is off there is no gradient at all, not even of an infinite dhidden.
    const bool is_off = p.activation == Activation::kRelu && activated.slope == 0.0f;
    gate[j] = is_off ? 0.0f : gate[j] * activated.slope;
    sums.gate[j] += gate[j];
    if (p.gated) sums.up[j] += up[j];
  }
  if (p.dpre.data != nullptr) {
    const QuadView<Element> dpre(p.dpre, p.is_vector);
    dpre.store(row, column, n, round_quad<Element>(gate));
    if (p.gated) dpre.store(row, n + column, 2 * n, round_quad<Element>(up));
  }
  if (p.hidden.data != nullptr) {
    if (p.dropout.seed != nullptr) drop(hidden, kept, p.dropout.scale);
    QuadView<Element>(p.hidden, p.is_vector).store(row, column, n, round_quad<Element>(hidden));
  }
}

// Sums of the columns of this thread go to a row of the partial sums.
__device__ __forceinline__ void store_sums(const LinearActivationBackward& p, int64_t partial_row,
                                           int column, const BiasSums& sums) {
  const int n = p.product.n;
  Raw<4> raw;
  const QuadView<Float32> partial(p.dbias_partial, p.is_vector);
  pack(Dtype::kFloat32, sums.gate, raw);
  partial.store(partial_row, column, n, raw);
  if (!p.gated) return;
  pack(Dtype::kFloat32, sums.up, raw);
  partial.store(partial_row, n + column, 2 * n, raw);
}

}  // namespace llmkernels

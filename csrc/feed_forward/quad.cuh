// Quads: four adjacent columns of a row in one thread.
#pragma once

#include "../common/dropout.cuh"
#include "../common/vector.cuh"
#include "elements.cuh"

namespace llmkernels {

// Four columns of a row, from ``column`` on.
using Quad = float[4];

// An operand of columns [*, columns]; where its rows are not aligned to quads, or end within one,
// elements are moved one by one. is_vector is uniform over the grid.
template <typename Element>
class QuadView {
 public:
  __device__ __forceinline__ QuadView(const Matrix& matrix, bool is_vector)
      : matrix_{matrix.data, matrix.row_stride, Element::dtype({})}, is_vector_(is_vector) {}

  // Columns from ``end`` on are not read and become zero.
  __device__ __forceinline__ Raw<4> load(int64_t row, int column, int end) const {
    Raw<4> raw;
    if (is_vector_) {
      llmkernels::load(matrix_, matrix_.dtype, row, Slot{column, column < end}, raw);
      return raw;
    }
    Quad values;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float value[1];
      load_values(matrix_, row, Slot{column + j, column + j < end}, value);
      values[j] = value[0];
    }
    pack(matrix_.dtype, values, raw);
    return raw;
  }

  __device__ __forceinline__ void store(int64_t row, int column, int end, const Raw<4>& raw) const {
    if (is_vector_) {
      llmkernels::store(matrix_, row, Slot{column, column < end}, raw);
      return;
    }
    Quad values;
    unpack(matrix_.dtype, raw, values);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_values<1>(matrix_, row, Slot{column + j, column + j < end}, {values[j]});
  }

 private:
  Matrix matrix_;
  bool is_vector_;
};

template <typename Element>
__device__ __forceinline__ void load_quad(const Raw<4>& raw, Quad& values) {
  unpack(Element::dtype({}), raw, values);
}

// Rounds the values and returns them as they lie in memory.
template <typename Element>
__device__ __forceinline__ Raw<4> round_quad(Quad& values) {
  Raw<4> raw;
  pack(Element::dtype({}), values, raw);
  unpack(Element::dtype({}), raw, values);
  return raw;
}

// The mask of a quad of hidden [M, n], 4 bits.
__device__ __forceinline__ uint32_t kept_by(const Dropout& dropout, int64_t row, int column,
                                            int n) {
  return kept_quad(static_cast<uint64_t>(*dropout.seed), dropout.threshold,
                   quad_counter(row, quads_of_row(n), column));
}

__device__ __forceinline__ void drop(Quad& values, uint32_t kept, float scale) {
#pragma unroll
  for (int j = 0; j < 4; ++j) values[j] = kept >> j & 1 ? values[j] * scale : 0.0f;
}

}  // namespace llmkernels

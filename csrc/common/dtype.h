// The element types of every operand, and the view of one that parameter structs carry. Host and
// device.
#pragma once

#include <cstdint>

namespace llmkernels {

enum class Dtype : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// Rows of adjacent columns. A vector [N] is a matrix of row stride 0; data is null where a call has
// no such operand.
struct Matrix {
  void* data = nullptr;    // [M, N]
  int64_t row_stride = 0;  // in elements; any value, 0 for an expanded row
  Dtype dtype = Dtype::kFloat32;
};

}  // namespace llmkernels

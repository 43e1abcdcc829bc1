// Dropout as every op has it (llmkernels/dropout.py): element (i, j) of a matrix of N columns takes
// word j % 4 of Philox-4x32-7 at counter i * ceil(N / 4) + j / 4, and is kept where the word's
// upper 31 bits are at least the threshold. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

namespace llmkernels {

struct Dropout {
  const int64_t* seed = nullptr;  // [1] on the device; null: no dropout
  uint32_t threshold = 0;
  float scale = 1.0f;  // of the elements that are kept
};

inline Dropout make_dropout(const int64_t* seed, double dropout_p) {
  Dropout dropout;
  if (seed == nullptr) return dropout;
  constexpr double kWords = 2147483648.0;  // 31 bits
  dropout.seed = seed;
  dropout.threshold =
      static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * kWords), kWords - 1.0));
  dropout.scale = dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - dropout_p));
  return dropout;
}

}  // namespace llmkernels

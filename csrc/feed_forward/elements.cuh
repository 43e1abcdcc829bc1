// Element types of products: those of ../common/convert.cuh, where Float32 is multiplied exactly
// (3xtf32), and float32 that is rounded to tf32.
#pragma once

#include "../common/platform.cuh"

#include "../common/convert.cuh"

namespace llmkernels {

struct Tf32 : Float32 {};

template <typename Element>
inline constexpr int kElementBytes = bytes_of(Element::dtype({}));

// Elements of a 16-byte chunk.
template <typename Element>
inline constexpr int kChunkElements = 16 / kElementBytes<Element>;

}  // namespace llmkernels

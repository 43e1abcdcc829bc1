// csrc/common/math.cuh: approximate instructions give the exact result, rounded; ftz is kept.
#pragma once

#include <cfloat>

#include "intrinsics.hpp"

namespace llmkernels::emulator {

inline float flush(float value) { return std::fabs(value) < FLT_MIN ? 0.0f * value : value; }

inline float ex2_approx_ftz_f32(float x) { return flush(std::exp2(flush(x))); }
inline float lg2_approx_ftz_f32(float x) { return std::log2(flush(x)); }
inline float rcp_approx_ftz_f32(float x) { return flush(1.0f / flush(x)); }
inline float tanh_approx_f32(float x) { return std::tanh(x); }

}  // namespace llmkernels::emulator

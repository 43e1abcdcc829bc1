// Functions of the special function unit, in base 2, and constants to bring other bases there. ftz:
// subnormal operands and results are taken for zero. CUDA's own erff, tanhf and log1pf serve where
// these are too coarse: each is within 2 ulp.
#pragma once

#include "platform.cuh"

namespace llmkernels {

inline constexpr float kLog2E = 1.4426950408889634f;  // exp(x) = exp2(kLog2E x)
inline constexpr float kLn2 = 0.6931471805599453f;    // log(x) = kLn2 log2(x)
inline constexpr float kSqrtHalf = 0.7071067811865476f;

#ifdef LLMKERNELS_EMULATOR

using emulator::ex2_approx_ftz_f32;
using emulator::lg2_approx_ftz_f32;
using emulator::rcp_approx_ftz_f32;
using emulator::tanh_approx_f32;

#else

// 2^x to a relative 2^-22; of -inf exactly 0.
__device__ __forceinline__ float ex2_approx_ftz_f32(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x): of 0 exactly -inf. To 2^-22, absolute between 0.5 and 2 and relative elsewhere.
__device__ __forceinline__ float lg2_approx_ftz_f32(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp.
__device__ __forceinline__ float rcp_approx_ftz_f32(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To a relative 2^-11 only: enough where the result is rounded to bfloat16 at once, not before a
// softmax.
__device__ __forceinline__ float tanh_approx_f32(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace llmkernels

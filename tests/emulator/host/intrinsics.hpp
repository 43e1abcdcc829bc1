// Arithmetic that CUDA offers by name. Approximate instructions get the exact result: theirs
// differs by a few ulps.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }

template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

// CUDA's min and max are overloads of plain types; those of float return the operand that is not
// NaN.
#define LLMKERNELS_EMULATOR_MIN_MAX(type)                      \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
LLMKERNELS_EMULATOR_MIN_MAX(int)
LLMKERNELS_EMULATOR_MIN_MAX(unsigned)
LLMKERNELS_EMULATOR_MIN_MAX(long)
LLMKERNELS_EMULATOR_MIN_MAX(unsigned long)
LLMKERNELS_EMULATOR_MIN_MAX(long long)
LLMKERNELS_EMULATOR_MIN_MAX(unsigned long long)
#undef LLMKERNELS_EMULATOR_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// mma.sync as an A100 computes it, as far as that is known from measurements (Fasi et al.,
// Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021; Khattak and
// Mikaitis, Accurate models of NVIDIA tensor cores, arXiv 2512.07004): K is taken in blocks of 8
// products of 16-bit elements or 4 of tf32. The products of a block, exact, and the accumulator are
// aligned to the largest exponent among them, cut off one bit below float32's last place there, and
// added; the sum is cut off to float32. Later GPUs keep a bit more and take longer blocks, so that
// this is the coarsest that the kernels will meet.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../host/convert.hpp"
#include "../host/matrix.hpp"
#include "collective.hpp"

namespace llmkernels::emulator {

namespace {

constexpr int kRows = 16, kColumns = 8, kMaxDepth = 16;
constexpr int kExtraBits = 1;
constexpr int kSignificandBits = 23;
// Of zero: below any exponent of a product, and far from overflowing a sum of two.
constexpr int kZeroExponent = -10000;
constexpr int kSmallestExponent = -300;

struct Fragments {
  float* d;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
  const void* code;
};

// An operand, decoded: values, and the exponents of their highest bits.
template <int kOuter, int kInner>
struct Operand {
  float values[kOuter][kInner];
  int exponents[kOuter][kInner];
  bool finite = true;

  void set(int i, int j, float value) {
    values[i][j] = value;
    exponents[i][j] = value == 0.0f ? kZeroExponent : std::max(exponent_field(value), 1) - 127;
    finite = finite && std::isfinite(value);
  }
  static int exponent_field(float value) {
    return static_cast<int>(__float_as_uint(value) >> 23 & 0xff);
  }
};

struct Problem {
  Operand<kRows, kMaxDepth> a;
  Operand<kMaxDepth, kColumns> b;
  Operand<kRows, kColumns> d;
};

double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float cut_to_float(double value) {
  const auto nearest = static_cast<float>(value);
  if (std::fabs(nearest) <= std::fabs(value) || std::fabs(value) >= 0x1p128) return nearest;
  return __uint_as_float(__float_as_uint(nearest) - 1);
}

void add_block(Problem& p, int row, int first, int count) {
  int exponents[kColumns];
  for (int j = 0; j < kColumns; ++j)
    exponents[j] = std::max(p.d.exponents[row][j], kSmallestExponent);
  for (int k = first; k < first + count; ++k) {
    for (int j = 0; j < kColumns; ++j)
      exponents[j] = std::max(exponents[j], p.a.exponents[row][k] + p.b.exponents[k][j]);
  }
  double units[kColumns];  // in one
  int sums[kColumns];      // in units: a product lies below 4 * 2^24, nine terms below 2^30
  for (int j = 0; j < kColumns; ++j) {
    units[j] = power_of_two(kSignificandBits + kExtraBits - exponents[j]);
    const double d = std::isfinite(p.d.values[row][j]) ? p.d.values[row][j] : 0.0;
    sums[j] = static_cast<int>(d * units[j]);
  }
  for (int k = first; k < first + count; ++k) {
    const double a = p.a.values[row][k];
    for (int j = 0; j < kColumns; ++j)
      sums[j] += static_cast<int>(a * static_cast<double>(p.b.values[k][j]) * units[j]);
  }
  for (int j = 0; j < kColumns; ++j) {
    // A sum that has overflowed stays infinite.
    if (std::isfinite(p.d.values[row][j])) p.d.set(row, j, cut_to_float(sums[j] / units[j]));
  }
}

void add_blocks(Problem& p, int depth) {
  for (int row = 0; row < kRows; ++row) {
    for (int first = 0; first < depth; first += depth / 2) add_block(p, row, first, depth / 2);
  }
}

template <int kOuter, int kInner>
void drop_nonfinite(Operand<kOuter, kInner>& operand) {
  for (int i = 0; i < kOuter; ++i) {
    for (int j = 0; j < kInner; ++j)
      if (!std::isfinite(operand.values[i][j])) operand.set(i, j, 0.0f);
  }
}

// With infinities or NaN somewhere: sums that meet one follow their rules, in float32, and NaN is
// the canonical one. All others are what they are beside finite ones.
void add_special(Problem& p, int depth) {
  const Problem given = p;
  drop_nonfinite(p.a);
  drop_nonfinite(p.b);
  drop_nonfinite(p.d);
  add_blocks(p, depth);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      float sum = given.d.values[i][j];
      bool is_special = !std::isfinite(sum);
      for (int k = 0; k < depth; ++k) {
        const float a = given.a.values[i][k], b = given.b.values[k][j];
        is_special = is_special || !std::isfinite(a) || !std::isfinite(b);
        sum += a * b;
      }
      if (is_special) p.d.values[i][j] = std::isnan(sum) ? __uint_as_float(0x7fffffffu) : sum;
    }
  }
}

// The element `half` of a word; `code` is where it was given.
float half_f16(uint32_t word, int half, const void*) {
  return cvt_f32_f16(static_cast<uint16_t>(word >> 16 * half));
}
float half_bf16(uint32_t word, int half, const void*) {
  return __uint_as_float(word >> 16 * half << 16);
}

float whole_tf32(uint32_t word, int, const void* code) {
  if ((word & 0x1fffu) != 0) {
    fail("bad operand",
         "mma.sync of tf32 is given " + std::to_string(__uint_as_float(word)) + " in " +
             block.name() + ", a float32 that has not been rounded to tf32",
         code);
  }
  return __uint_as_float(word);
}

// A word holds kPerWord neighbouring elements of K.
template <int kPerWord, float (*decode)(uint32_t, int, const void*)>
void multiply(Collective& warp) {
  constexpr int kDepth = 8 * kPerWord;
  Problem p;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& own = warp.argument<Fragments>(lane);
    const int g = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4);
    for (int half = 0; half < kPerWord; ++half) {
      const int low = kPerWord * t + half, high = low + 4 * kPerWord;
      p.a.set(g, low, decode(own.a[0], half, own.code));
      p.a.set(g + 8, low, decode(own.a[1], half, own.code));
      p.a.set(g, high, decode(own.a[2], half, own.code));
      p.a.set(g + 8, high, decode(own.a[3], half, own.code));
      p.b.set(low, g, decode(own.b[0], half, own.code));
      p.b.set(high, g, decode(own.b[1], half, own.code));
    }
    for (int e = 0; e < 4; ++e) p.d.set(g + e / 2 * 8, 2 * t + e % 2, own.d[e]);
  }
  if (p.a.finite && p.b.finite && p.d.finite) {
    add_blocks(p, kDepth);
  } else {
    add_special(p, kDepth);
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    float* d = warp.argument<Fragments>(lane).d;
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned e = 0; e < 4; ++e) d[e] = p.d.values[g + e / 2 * 8][2 * t + e % 2];
  }
}

}  // namespace

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments fragments{d, a, {b0, b1}, __builtin_return_address(0)};
  join_whole_warp("mma.sync.m16n8k16.f16", &fragments, multiply<2, half_f16>, fragments.code);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments fragments{d, a, {b0, b1}, __builtin_return_address(0)};
  join_whole_warp("mma.sync.m16n8k16.bf16", &fragments, multiply<2, half_bf16>, fragments.code);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments fragments{d, a, {b0, b1}, __builtin_return_address(0)};
  join_whole_warp("mma.sync.m16n8k8.tf32", &fragments, multiply<1, whole_tf32>, fragments.code);
}

}  // namespace llmkernels::emulator

// Products of whole tiles through the loaders of csrc/sm80/fragments.cuh, and masks of dropout.
#include "sm80/fragments.cuh"

#include "probes.h"
#include "sm80/cp_async.cuh"
#include "sm80/dropout_fragments.cuh"
#include "sm80/tf32.cuh"

namespace llmkernels::probes {

namespace {

// Rows of kRowBytes from global to swizzled shared memory.
template <int kRowBytes>
__device__ void copy_tile(unsigned char* tile, const uint32_t* source, int rows) {
  constexpr int kChunks = kRowBytes / kChunkBytes;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks; i += static_cast<int>(blockDim.x))
    cp_async_cg_16(shared_address(tile + swizzled<kRowBytes>(i / kChunks, i % kChunks)),
                   source + 4 * i);
  cp_async_commit_group();
}

// D = A B, 16 x 16 x kDepth, by one warp. input: A [16, K] or, if kTransA, [K, 16]; then B [N, K]
// or, if kTransB, [K, N]. Rows of 16 columns are padded to kDepth. output: float32 [16, 16].
template <typename Element, bool kTransA, bool kTransB, bool k3xTf32>
__global__ void product(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  constexpr bool kWide = Element::dtype({}) == Dtype::kFloat32;
  constexpr int kBytes = kWide ? 4 : 2, kDepth = 32, kRowBytes = kDepth * kBytes;
  constexpr int kPerChunk = kChunkBytes / kBytes, kStep = kMmaDepth<Element>;
  constexpr int kTileBytes = kDepth * kRowBytes;
  unsigned char* const b_tile = smem + kTileBytes;
  copy_tile<kRowBytes>(smem, probe.input, kDepth);
  copy_tile<kRowBytes>(b_tile, probe.input + kTileBytes / 4, kDepth);
  cp_async_wait_group<0>();
  __syncthreads();

  float d[2][4] = {};
  for (int k = 0; k < kDepth; k += kStep) {
    uint32_t a[4], b[4];
    if constexpr (!kTransA) {
      load_a<kRowBytes>(a, shared_address(smem), 0, k / kPerChunk);
    } else if constexpr (kWide) {
      load_a_trans_32<kRowBytes, KOrder::kMatrix>(a, smem, k, 0);
    } else {
      load_a_trans<kRowBytes>(a, shared_address(smem), k, 0);
    }
    if constexpr (!kTransB) {
      load_b<kRowBytes>(b, shared_address(b_tile), 0, k / kPerChunk);
    } else if constexpr (kWide) {
      load_b_trans_32<kRowBytes, KOrder::kMatrix>(b, b_tile, k, 0);
    } else {
      load_b_trans<kRowBytes>(b, shared_address(b_tile), k, 0);
    }
    if constexpr (k3xTf32) {
      uint32_t a_small[4], b_small[4];
      split_to_tf32(a, a_small);
      split_to_tf32(b, b_small);
      for (int n = 0; n < 2; ++n)
        mma_m16n8k8_3xtf32(d[n], a, a_small, b[2 * n], b[2 * n + 1], b_small[2 * n],
                           b_small[2 * n + 1]);
      continue;
    }
    if constexpr (kWide) {
      round_to_tf32(a);
      round_to_tf32(b);
    }
    for (int n = 0; n < 2; ++n) mma<Element>(d[n], a, b[2 * n], b[2 * n + 1]);
  }
  for (int n = 0; n < 2; ++n) {
    for (int e = 0; e < 4; ++e)
      probe.output[accumulator_row(e) * 16 + 8 * n + accumulator_column(e)] =
          __float_as_uint(d[n][e]);
  }
}

// D = (A B) C with A B kept in registers, each 16 x 16, A [M, K], B [N, K] and C [K, N] in rows of
// 16 columns; A B is rounded to the element type in between.
template <typename Element>
__global__ void chained(const __grid_constant__ Probe probe) {
  LLMKERNELS_SHARED(smem);
  constexpr bool kWide = Element::dtype({}) == Dtype::kFloat32;
  constexpr int kRowBytes = kWide ? 64 : 32, kTileBytes = 16 * kRowBytes;
  unsigned char* const b_tile = smem + kTileBytes;
  unsigned char* const c_tile = b_tile + kTileBytes;
  copy_tile<kRowBytes>(smem, probe.input, 48);
  cp_async_wait_group<0>();
  __syncthreads();

  float s[2][4] = {};
  for (int chunk = 0; chunk < kRowBytes / kChunkBytes; chunk += 2) {
    uint32_t a[4], b[4];
    load_a<kRowBytes>(a, shared_address(smem), 0, chunk);
    load_b<kRowBytes>(b, shared_address(b_tile), 0, chunk);
    if constexpr (kWide) {
      round_to_tf32(a);
      round_to_tf32(b);
    }
    for (int n = 0; n < 2; ++n) mma<Element>(s[n], a, b[2 * n], b[2 * n + 1]);
  }
  float d[2][4] = {};
  for (int k = 0; k < 16; k += kMmaDepth<Element>) {
    uint32_t a[4], c[4];
    if constexpr (kWide) {
      a_of_accumulator_32(a, s[k / 8]);
      load_b_trans_32<kRowBytes, KOrder::kAccumulator>(c, c_tile, k, 0);
      round_to_tf32(a);
      round_to_tf32(c);
    } else {
      a_of_accumulators<Element>(a, s[0], s[1]);
      load_b_trans<kRowBytes>(c, shared_address(c_tile), k, 0);
    }
    for (int n = 0; n < 2; ++n) mma<Element>(d[n], a, c[2 * n], c[2 * n + 1]);
  }
  for (int n = 0; n < 2; ++n) {
    for (int e = 0; e < 4; ++e)
      probe.output[accumulator_row(e) * 16 + 8 * n + accumulator_column(e)] =
          __float_as_uint(d[n][e]);
  }
}

// input: seed (2 words), threshold, columns of the mask, first row, first column. output: 1 where
// kept, [16, 16] and then [8, 16] made from its transpose.
__global__ void dropout_masks(const __grid_constant__ Probe probe) {
  const uint64_t seed = uint64_t{probe.input[1]} << 32 | probe.input[0];
  const uint32_t threshold = probe.input[2], quads = quads_of_row(static_cast<int>(probe.input[3]));
  const uint64_t counter = quad_counter(probe.input[4], quads, static_cast<int>(probe.input[5]));
  const uint32_t kept = kept_16x16(seed, threshold, counter, quads);
  const uint32_t kept_trans = kept_8x16_trans(seed, threshold, counter, quads);
  for (int e = 0; e < 4; ++e) {
    for (int n = 0; n < 2; ++n)
      probe.output[accumulator_row(e) * 16 + 8 * n + accumulator_column(e)] =
          kept >> (4 * n + e) & 1;
    probe.output[256 + accumulator_column(e) * 16 + accumulator_row(e)] = kept_trans >> e & 1;
  }
}

// Where swizzled() puts each chunk of 16 rows; output: [16, chunks].
template <int kRowBytes>
__global__ void swizzles(const __grid_constant__ Probe probe) {
  constexpr int kChunks = kRowBytes / kChunkBytes;
  for (int i = static_cast<int>(threadIdx.x); i < 16 * kChunks; i += static_cast<int>(blockDim.x))
    probe.output[i] = static_cast<uint32_t>(swizzled<kRowBytes>(i / kChunks, i % kChunks));
}

constexpr Feature kFeatures[] = {
    {"product_f16", go<product<Float16, false, false, false>>},
    {"product_f16_trans_a", go<product<Float16, true, false, false>>},
    {"product_bf16_trans_b", go<product<BFloat16, false, true, false>>},
    {"product_bf16_trans_both", go<product<BFloat16, true, true, false>>},
    {"product_tf32", go<product<Float32, false, false, false>>},
    {"product_tf32_trans_a", go<product<Float32, true, false, false>>},
    {"product_3xtf32_trans_b", go<product<Float32, false, true, true>>},
    {"chained_f16", go<chained<Float16>>},
    {"chained_bf16", go<chained<BFloat16>>},
    {"chained_tf32", go<chained<Float32>>},
    {"dropout_masks", go<dropout_masks>},
    {"swizzles_16", go<swizzles<16>>},
    {"swizzles_32", go<swizzles<32>>},
    {"swizzles_64", go<swizzles<64>>},
    {"swizzles_96", go<swizzles<96>>},
    {"swizzles_128", go<swizzles<128>>},
    {"swizzles_192", go<swizzles<192>>},
    {"swizzles_384", go<swizzles<384>>},
    {"swizzles_512", go<swizzles<512>>},
};

}  // namespace

Launcher find_fragment_feature(const char* name) { return find(kFeatures, name); }

}  // namespace llmkernels::probes

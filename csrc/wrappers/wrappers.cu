// A struct for each wrapper: what one thread does with its words. `in` and `out` are in global
// memory; shared memory is kSharedBytes and left to the wrapper.
#include <cstring>

#include "../common/barrier.cuh"
#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "../common/philox.cuh"
#include "../sm80/cp_async.cuh"
#include "../sm80/ldmatrix.cuh"
#include "../sm80/mma.cuh"
#include "../sm90/stmatrix.cuh"
#include "wrappers.h"

namespace llmkernels {

// Not an unnamed one, for the kernels' sake: their names are listed.
namespace instructions {

constexpr int kSharedBytes = 1024;
constexpr uint32_t kWholeWarp = 0xffffffffu;

template <int kInputs, int kOutputs, int kThreads_ = 32>
struct Words {
  static constexpr int kInputWords = kInputs, kOutputWords = kOutputs, kThreads = kThreads_;
};

__device__ __forceinline__ float as_float(uint32_t word) { return __uint_as_float(word); }

// f(float) -> float
#define LLMKERNELS_FLOAT_FUNCTION(function)                                         \
  struct Run_##function : Words<1, 1> {                                             \
    __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) { \
      out[0] = __float_as_uint(function(as_float(in[0])));                          \
    }                                                                               \
  };
LLMKERNELS_FLOAT_FUNCTION(ex2_approx_ftz_f32)
LLMKERNELS_FLOAT_FUNCTION(lg2_approx_ftz_f32)
LLMKERNELS_FLOAT_FUNCTION(rcp_approx_ftz_f32)
LLMKERNELS_FLOAT_FUNCTION(tanh_approx_f32)
LLMKERNELS_FLOAT_FUNCTION(rsqrtf)
LLMKERNELS_FLOAT_FUNCTION(erff)
LLMKERNELS_FLOAT_FUNCTION(tanhf)
#undef LLMKERNELS_FLOAT_FUNCTION

struct Run_cvt_f32_f16 : Words<1, 1> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = __float_as_uint(cvt_f32_f16(static_cast<uint16_t>(in[0])));
  }
};

struct Run_cvt_rn_f16x2_f32 : Words<2, 1> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = cvt_rn_f16x2_f32(as_float(in[0]), as_float(in[1]));
  }
};

struct Run_cvt_rn_bf16x2_f32 : Words<2, 1> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = cvt_rn_bf16x2_f32(as_float(in[0]), as_float(in[1]));
  }
};

struct Run_cvt_rna_tf32_f32 : Words<1, 1> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    out[0] = cvt_rna_tf32_f32(as_float(in[0]));
  }
};

// in: seed, counter, each of 64 bits.
struct Run_philox_4x32_7 : Words<4, 4> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    const uint4 words = philox_4x32_7(uint64_t{in[1]} << 32 | in[0], uint64_t{in[3]} << 32 | in[2]);
    out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
  }
};

// Shuffles take a distance, a lane or a mask that is the same for all lanes; in: value, distance.
#define LLMKERNELS_SHUFFLE(function)                                                \
  struct Run_##function : Words<2, 1> {                                             \
    __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) { \
      out[0] = function(kWholeWarp, in[0], static_cast<int>(in[1]));                \
    }                                                                               \
  };
LLMKERNELS_SHUFFLE(__shfl_sync)
LLMKERNELS_SHUFFLE(__shfl_xor_sync)
LLMKERNELS_SHUFFLE(__shfl_up_sync)
LLMKERNELS_SHUFFLE(__shfl_down_sync)
#undef LLMKERNELS_SHUFFLE

// Votes and reductions of one word, of the type that the function takes.
#define LLMKERNELS_ALL_LANES(name, function, type)                                    \
  struct Run_##name : Words<1, 1> {                                                   \
    __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {   \
      out[0] = static_cast<uint32_t>(function(kWholeWarp, static_cast<type>(in[0]))); \
    }                                                                                 \
  };
LLMKERNELS_ALL_LANES(__ballot_sync, __ballot_sync, int)
LLMKERNELS_ALL_LANES(__any_sync, __any_sync, int)
LLMKERNELS_ALL_LANES(__all_sync, __all_sync, int)
LLMKERNELS_ALL_LANES(__reduce_add_sync, __reduce_add_sync, unsigned)
LLMKERNELS_ALL_LANES(__reduce_min_sync, __reduce_min_sync, int)
LLMKERNELS_ALL_LANES(__reduce_max_sync, __reduce_max_sync, int)
LLMKERNELS_ALL_LANES(__reduce_and_sync, __reduce_and_sync, unsigned)
LLMKERNELS_ALL_LANES(__reduce_or_sync, __reduce_or_sync, unsigned)
LLMKERNELS_ALL_LANES(__reduce_xor_sync, __reduce_xor_sync, unsigned)
#undef LLMKERNELS_ALL_LANES

// Two warps of four exchange their words at barrier 1, the other two at barrier 2.
struct Run_bar_sync : Words<1, 1, 128> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    auto* words = reinterpret_cast<uint32_t*>(shared);
    words[threadIdx.x] = in[0];
    bar_sync(1 + threadIdx.x / 64, 64);
    out[0] = words[threadIdx.x ^ 32];
  }
};

// in: 16 bytes of data, source_bytes, three words unused. In two groups, so that wait_group counts:
// the first copy is read while the second may be in flight.
template <int kBytes, void (*copy)(uint32_t, const void*, int)>
struct Copy : Words<8, 8> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    unsigned char* place[] = {shared + 16 * threadIdx.x, shared + 512 + 16 * threadIdx.x};
#pragma unroll
    for (int group = 0; group < 2; ++group) {
#pragma unroll
      for (int byte = 0; byte < 16; byte += kBytes) {
        const int valid = min(max(static_cast<int>(in[4]) - byte, 0), kBytes);
        copy(shared_address(place[group] + byte), in + byte / 4, valid);
      }
      cp_async_commit_group();
    }
    cp_async_wait_group<1>();
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = reinterpret_cast<uint32_t*>(place[0])[i];
    cp_async_wait_group<0>();
#pragma unroll
    for (int i = 0; i < 4; ++i) out[4 + i] = reinterpret_cast<uint32_t*>(place[1])[i];
  }
};
using Run_cp_async_ca_4 = Copy<4, cp_async_ca_4>;
using Run_cp_async_ca_8 = Copy<8, cp_async_ca_8>;
using Run_cp_async_cg_16 = Copy<16, cp_async_cg_16>;

// in: the 16 bytes of a row, and the number of the row whose address this lane gives.
template <int kMatrices, void (*load)(uint32_t (&)[kMatrices], uint32_t)>
struct LoadMatrix : Words<5, kMatrices> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
#pragma unroll
    for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(shared)[4 * threadIdx.x + i] = in[i];
    __syncwarp();
    uint32_t words[kMatrices];
    load(words, shared_address(shared + 16 * in[4]));
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) out[i] = words[i];
  }
};
using Run_ldmatrix_x1 = LoadMatrix<1, ldmatrix_x1>;
using Run_ldmatrix_x2 = LoadMatrix<2, ldmatrix_x2>;
using Run_ldmatrix_x4 = LoadMatrix<4, ldmatrix_x4>;
using Run_ldmatrix_x1_trans = LoadMatrix<1, ldmatrix_x1_trans>;
using Run_ldmatrix_x2_trans = LoadMatrix<2, ldmatrix_x2_trans>;
using Run_ldmatrix_x4_trans = LoadMatrix<4, ldmatrix_x4_trans>;

// in: four words of a fragment, and the number of the row whose address this lane gives. out: the
// 16 bytes of a row.
template <void (*store)(uint32_t, const uint32_t (&)[4])>
struct StoreMatrix : Words<5, 4> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char* shared) {
    const uint32_t words[4] = {in[0], in[1], in[2], in[3]};
    store(shared_address(shared + 16 * in[4]), words);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = reinterpret_cast<uint32_t*>(shared)[4 * threadIdx.x + i];
  }
};
using Run_stmatrix_x4 = StoreMatrix<stmatrix_x4>;
using Run_stmatrix_x4_trans = StoreMatrix<stmatrix_x4_trans>;
using Run_stmatrix_x4_by_shuffles = StoreMatrix<stmatrix_x4_by_shuffles>;
using Run_stmatrix_x4_trans_by_shuffles = StoreMatrix<stmatrix_x4_trans_by_shuffles>;

// in: a[4], b0, b1, d[4].
template <void (*multiply)(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t)>
struct Multiply : Words<10, 4> {
  __device__ static void run(const uint32_t* in, uint32_t* out, unsigned char*) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4] = {as_float(in[6]), as_float(in[7]), as_float(in[8]), as_float(in[9])};
    multiply(d, a, in[4], in[5]);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __float_as_uint(d[i]);
  }
};
using Run_mma_m16n8k16_f16 = Multiply<mma_m16n8k16_f16>;
using Run_mma_m16n8k16_bf16 = Multiply<mma_m16n8k16_bf16>;
using Run_mma_m16n8k8_tf32 = Multiply<mma_m16n8k8_tf32>;

struct Operands {
  const uint32_t* input;  // [threads, input_words]
  uint32_t* output;       // [threads, output_words]
};

template <typename Run>
__global__ void __launch_bounds__(Run::kThreads)
    instruction_kernel(const __grid_constant__ Operands operands) {
  LLMKERNELS_SHARED(shared);
  Run::run(operands.input + threadIdx.x * Run::kInputWords,
           operands.output + threadIdx.x * Run::kOutputWords, shared);
}

template <typename Run>
cudaError_t launch_wrapper(const Operands& operands, cudaStream_t stream) {
  return launch(instruction_kernel<Run>, 1, Run::kThreads, kSharedBytes, stream, operands);
}

struct Row {
  Wrapper wrapper;
  cudaError_t (*launch)(const Operands&, cudaStream_t);
};

#define LLMKERNELS_ROW(name)                                                          \
  Row {                                                                               \
    {#name, Run_##name::kThreads, Run_##name::kInputWords, Run_##name::kOutputWords}, \
        launch_wrapper<Run_##name>                                                    \
  }
constexpr Row kRows[] = {
    LLMKERNELS_ROW(cvt_f32_f16),
    LLMKERNELS_ROW(cvt_rn_f16x2_f32),
    LLMKERNELS_ROW(cvt_rn_bf16x2_f32),
    LLMKERNELS_ROW(cvt_rna_tf32_f32),
    LLMKERNELS_ROW(ex2_approx_ftz_f32),
    LLMKERNELS_ROW(lg2_approx_ftz_f32),
    LLMKERNELS_ROW(rcp_approx_ftz_f32),
    LLMKERNELS_ROW(tanh_approx_f32),
    LLMKERNELS_ROW(rsqrtf),
    LLMKERNELS_ROW(erff),
    LLMKERNELS_ROW(tanhf),
    LLMKERNELS_ROW(philox_4x32_7),
    LLMKERNELS_ROW(__shfl_sync),
    LLMKERNELS_ROW(__shfl_xor_sync),
    LLMKERNELS_ROW(__shfl_up_sync),
    LLMKERNELS_ROW(__shfl_down_sync),
    LLMKERNELS_ROW(__ballot_sync),
    LLMKERNELS_ROW(__any_sync),
    LLMKERNELS_ROW(__all_sync),
    LLMKERNELS_ROW(__reduce_add_sync),
    LLMKERNELS_ROW(__reduce_min_sync),
    LLMKERNELS_ROW(__reduce_max_sync),
    LLMKERNELS_ROW(__reduce_and_sync),
    LLMKERNELS_ROW(__reduce_or_sync),
    LLMKERNELS_ROW(__reduce_xor_sync),
    LLMKERNELS_ROW(bar_sync),
    LLMKERNELS_ROW(cp_async_ca_4),
    LLMKERNELS_ROW(cp_async_ca_8),
    LLMKERNELS_ROW(cp_async_cg_16),
    LLMKERNELS_ROW(ldmatrix_x1),
    LLMKERNELS_ROW(ldmatrix_x2),
    LLMKERNELS_ROW(ldmatrix_x4),
    LLMKERNELS_ROW(ldmatrix_x1_trans),
    LLMKERNELS_ROW(ldmatrix_x2_trans),
    LLMKERNELS_ROW(ldmatrix_x4_trans),
    LLMKERNELS_ROW(stmatrix_x4),
    LLMKERNELS_ROW(stmatrix_x4_trans),
    LLMKERNELS_ROW(stmatrix_x4_by_shuffles),
    LLMKERNELS_ROW(stmatrix_x4_trans_by_shuffles),
    LLMKERNELS_ROW(mma_m16n8k16_f16),
    LLMKERNELS_ROW(mma_m16n8k16_bf16),
    LLMKERNELS_ROW(mma_m16n8k8_tf32),
};
#undef LLMKERNELS_ROW

}  // namespace instructions

int wrapper_count() { return sizeof instructions::kRows / sizeof instructions::kRows[0]; }

const Wrapper& wrapper(int row) { return instructions::kRows[row].wrapper; }

cudaError_t run_wrapper(const char* name, const uint32_t* input, uint32_t* output,
                        cudaStream_t stream) {
  for (const instructions::Row& row : instructions::kRows) {
    if (std::strcmp(row.wrapper.name, name) == 0) return row.launch({input, output}, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace llmkernels

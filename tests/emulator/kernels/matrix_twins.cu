// Twins, as in twins.cu, of the instructions that a whole warp executes. A tile of shared memory
// has 32 rows of 16 bytes, the four matrices of ldmatrix_x4.
#include "probes.h"
#include "sm80/cp_async.cuh"
#include "sm80/fragments.cuh"
#include "sm80/mma.cuh"
#include "sm90/stmatrix.cuh"

namespace llmkernels::probes {

namespace {

__device__ uint32_t* shared_words() {
  LLMKERNELS_SHARED(smem);
  return reinterpret_cast<uint32_t*>(smem);
}

// Small binary16 numbers, another in each place.
__device__ void fill_row(unsigned row) {
  for (unsigned i = 0; i < 4; ++i) {
    const auto number = static_cast<float>((17 * row + 5 * i) % 23);
    shared_words()[4 * row + i] = cvt_rn_f16x2_f32(number, 1.0f - number);
  }
}

__device__ uint32_t row_address(unsigned row) { return shared_address(shared_words() + 4 * row); }

__device__ void keep(const Probe& probe, const uint32_t (&words)[4]) {
  probe.output[threadIdx.x] = words[0] ^ words[1] ^ words[2] ^ words[3];
}

template <bool kBug>
__global__ void matrix_without_warp_sync(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  fill_row(threadIdx.x);
  if (!kBug) __syncwarp();
  ldmatrix_x4(words, row_address(threadIdx.x));
  keep(probe, words);
}

// Each warp loads what the other has written.
template <bool kBug>
__global__ void matrix_without_barrier(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  fill_row(threadIdx.x);
  if (kBug) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  ldmatrix_x4_trans(words, row_address(threadIdx.x ^ 32));
  keep(probe, words);
}

template <bool kBug>
__global__ void matrix_before_its_copy(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  cp_async_cg_16(row_address(threadIdx.x), probe.input + 4 * threadIdx.x);
  cp_async_commit_group();
  if (!kBug) cp_async_wait_group<0>();
  __syncthreads();
  ldmatrix_x4(words, row_address(threadIdx.x));
  keep(probe, words);
}

// The wait makes a thread see its own copies only, even where the lane that copied a row gives its
// address: the words go to other lanes.
template <bool kBug>
__global__ void matrix_of_own_copies(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  cp_async_cg_16(row_address(threadIdx.x), probe.input + 4 * threadIdx.x);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  if (!kBug) __syncwarp();
  ldmatrix_x4(words, row_address(threadIdx.x));
  keep(probe, words);
}

template <bool kBug>
__global__ void copy_over_a_matrix(const __grid_constant__ Probe probe) {
  uint32_t sum[4] = {}, words[4];
  for (unsigned stage = 0; stage < 2; ++stage) {
    if (!kBug) __syncthreads();
    cp_async_cg_16(row_address(threadIdx.x), probe.input + 4 * threadIdx.x);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    __syncthreads();
    ldmatrix_x4(words, row_address(threadIdx.x ^ 32));
    for (unsigned i = 0; i < 4; ++i) sum[i] += words[i];
  }
  keep(probe, sum);
}

// Rows past the end are skipped where they should become zeros.
template <bool kBug>
__global__ void zero_fill_forgotten(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  const bool valid = threadIdx.x < 27;
  if (valid || !kBug) cp_async_cg_16(row_address(threadIdx.x), probe.input, valid ? 16 : 0);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncwarp();
  ldmatrix_x4(words, row_address(threadIdx.x));
  keep(probe, words);
}

// Half of a tile's rows; the loader of fragments reads them all.
template <bool kBug>
__global__ void tile_not_filled(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  if (!kBug || threadIdx.x < 16) fill_row(threadIdx.x);
  __syncwarp();
  load_a<32>(words, row_address(0), 0, 0);
  keep(probe, words);
}

template <bool kBug>
__global__ void matrix_past_the_end(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  fill_row(threadIdx.x);
  __syncwarp();
  ldmatrix_x4(words, row_address(threadIdx.x + (kBug && threadIdx.x == 31 ? 1 : 0)));
  keep(probe, words);
}

template <bool kBug>
__global__ void matrix_misaligned(const __grid_constant__ Probe probe) {
  uint32_t words[2];
  fill_row(threadIdx.x);
  __syncwarp();
  // Of x2 the addresses of lanes 16 to 31 do not count.
  ldmatrix_x2(words, row_address(threadIdx.x) + (threadIdx.x >= (kBug ? 15 : 16) ? 8 : 0));
  probe.output[threadIdx.x] = words[0] ^ words[1];
}

template <bool kBug>
__global__ void matrix_of_half_a_warp(const __grid_constant__ Probe probe) {
  uint32_t words[4] = {};
  fill_row(threadIdx.x);
  __syncwarp();
  if (!kBug || threadIdx.x < 16) ldmatrix_x4(words, row_address(threadIdx.x));
  keep(probe, words);
}

template <bool kBug>
__global__ void two_kinds_of_matrix(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  fill_row(threadIdx.x);
  __syncwarp();
  if (kBug && threadIdx.x % 2 == 1) {
    ldmatrix_x4_trans(words, row_address(threadIdx.x));
  } else {
    ldmatrix_x4(words, row_address(threadIdx.x));
  }
  keep(probe, words);
}

template <bool kBug>
__global__ void stored_matrix_read_too_early(const __grid_constant__ Probe probe) {
  const uint32_t words[4] = {1, 2, 3, 4};
  stmatrix_x4(row_address(threadIdx.x), words);
  if (!kBug) __syncwarp();
  probe.output[threadIdx.x] = shared_words()[4 * threadIdx.x];
}

template <bool kBug>
__global__ void stored_matrices_overlap(const __grid_constant__ Probe probe) {
  const uint32_t words[4] = {1, 2, 3, 4};
  stmatrix_x4_trans(row_address(kBug ? threadIdx.x % 31 : threadIdx.x), words);
  probe.output[threadIdx.x] = words[0];
}

template <bool kBug>
__global__ void stored_matrix_misaligned(const __grid_constant__ Probe probe) {
  const uint32_t words[4] = {1, 2, 3, 4};
  stmatrix_x4(row_address(threadIdx.x) + (kBug ? 4 : 0), words);
  probe.output[threadIdx.x] = words[0];
}

template <bool kBug>
__global__ void product_of_half_a_warp(const __grid_constant__ Probe probe) {
  probe.output[threadIdx.x] = 0;
  if (kBug && threadIdx.x >= 16) return;
  const uint32_t a[4] = {probe.input[threadIdx.x]};
  float d[4] = {};
  mma_m16n8k16_bf16(d, a, 0, 0);
  probe.output[threadIdx.x] = __float_as_uint(d[0]);
}

template <bool kBug>
__global__ void two_kinds_of_product(const __grid_constant__ Probe probe) {
  const uint32_t a[4] = {probe.input[threadIdx.x]};
  float d[4] = {};
  if (kBug && threadIdx.x >= 16) {
    mma_m16n8k16_f16(d, a, 0, 0);
  } else {
    mma_m16n8k16_bf16(d, a, 0, 0);
  }
  probe.output[threadIdx.x] = __float_as_uint(d[0]);
}

template <bool kBug>
__global__ void tf32_not_rounded(const __grid_constant__ Probe probe) {
  const float value = 0.1f * static_cast<float>(probe.input[threadIdx.x]);
  const uint32_t a[4] = {kBug ? __float_as_uint(value) : cvt_rna_tf32_f32(value)};
  float d[4] = {};
  mma_m16n8k8_tf32(d, a, 0, 0);
  probe.output[threadIdx.x] = __float_as_uint(d[0]);
}

// Copies of 4 and of 8 bytes: aligned to their own size, whatever 16 bytes would need.
template <bool kBug, int kBytes, void (*copy)(uint32_t, const void*, int)>
__device__ void small_copy(const Probe& probe) {
  const unsigned place = kBytes / 4 * threadIdx.x;
  const auto* source = reinterpret_cast<const char*>(probe.input) + kBytes;
  copy(shared_address(shared_words() + place), source + (kBug ? kBytes / 2 : 0), kBytes);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  probe.output[threadIdx.x] = shared_words()[place];
}

template <bool kBug>
__global__ void copy_4_misaligned(const __grid_constant__ Probe probe) {
  small_copy<kBug, 4, cp_async_ca_4>(probe);
}

template <bool kBug>
__global__ void copy_8_misaligned(const __grid_constant__ Probe probe) {
  small_copy<kBug, 8, cp_async_ca_8>(probe);
}

template <bool kBug>
__global__ void copy_to_a_misaligned_place(const __grid_constant__ Probe probe) {
  cp_async_cg_16(row_address(threadIdx.x) + (kBug ? 8 : 0), probe.input);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  probe.output[threadIdx.x] = shared_words()[4 * threadIdx.x];
}

// Right and wrong words of fragments: nothing is reported, the product is another.
template <bool kBug>
__global__ void words_of_b_exchanged(const __grid_constant__ Probe probe) {
  uint32_t a[4], b[4];
  for (unsigned row = threadIdx.x; row < 64; row += 32) fill_row(row);
  __syncwarp();
  load_a<32>(a, row_address(0), 0, 0);
  load_b<32>(b, row_address(32), 0, 0);
  float d[4] = {};
  mma_m16n8k16_f16(d, a, b[kBug ? 1 : 0], b[kBug ? 0 : 1]);
  probe.output[threadIdx.x] = __float_as_uint(d[0]);
}

template <bool kBug>
__global__ void words_of_a_exchanged(const __grid_constant__ Probe probe) {
  uint32_t a[4], b[4];
  for (unsigned row = threadIdx.x; row < 64; row += 32) fill_row(row);
  __syncwarp();
  load_a<32>(a, row_address(0), 0, 0);
  load_b<32>(b, row_address(32), 0, 0);
  const uint32_t turned[4] = {a[0], a[2], a[1], a[3]};
  float d[4] = {};
  mma_m16n8k16_f16(d, kBug ? turned : a, b[0], b[1]);
  probe.output[threadIdx.x] = __float_as_uint(d[0]);
}

// Rows of 128 bytes in their place: eight rows of a column meet in four banks.
template <bool kBug>
__global__ void bank_conflict(const __grid_constant__ Probe probe) {
  uint32_t words[4];
  for (unsigned row = threadIdx.x; row < 256; row += 32) fill_row(row);
  __syncwarp();
  const int row = static_cast<int>(threadIdx.x);
  const int offset = kBug ? 128 * row : swizzled<128>(row, 0);
  ldmatrix_x4(words, row_address(0) + static_cast<uint32_t>(offset));
  keep(probe, words);
}

constexpr Twins kTwins[] = {
    LLMKERNELS_TWINS(matrix_without_warp_sync),
    LLMKERNELS_TWINS(matrix_without_barrier),
    LLMKERNELS_TWINS(matrix_before_its_copy),
    LLMKERNELS_TWINS(matrix_of_own_copies),
    LLMKERNELS_TWINS(copy_over_a_matrix),
    LLMKERNELS_TWINS(zero_fill_forgotten),
    LLMKERNELS_TWINS(tile_not_filled),
    LLMKERNELS_TWINS(matrix_past_the_end),
    LLMKERNELS_TWINS(matrix_misaligned),
    LLMKERNELS_TWINS(matrix_of_half_a_warp),
    LLMKERNELS_TWINS(two_kinds_of_matrix),
    LLMKERNELS_TWINS(stored_matrix_read_too_early),
    LLMKERNELS_TWINS(stored_matrices_overlap),
    LLMKERNELS_TWINS(stored_matrix_misaligned),
    LLMKERNELS_TWINS(product_of_half_a_warp),
    LLMKERNELS_TWINS(two_kinds_of_product),
    LLMKERNELS_TWINS(tf32_not_rounded),
    LLMKERNELS_TWINS(copy_to_a_misaligned_place),
    LLMKERNELS_TWINS(copy_4_misaligned),
    LLMKERNELS_TWINS(copy_8_misaligned),
    LLMKERNELS_TWINS(words_of_b_exchanged),
    LLMKERNELS_TWINS(words_of_a_exchanged),
    LLMKERNELS_TWINS(bank_conflict),
};

}  // namespace

Launcher find_matrix_twin(const char* name, bool bug) { return find(kTwins, name, bug); }

}  // namespace llmkernels::probes

// The host side of the op, the gradient of an activation that no product follows, and the last sum
// of the bias gradient.
#include <initializer_list>

#include "../common/partial_rows.cuh"
#include "../common/reduce.cuh"
#include "gradient.cuh"
#include "schedule.cuh"

namespace llmkernels {

// dhidden is dy: a block has kElementwiseRows rows, which its warps take in turn, of 32 quads of
// columns; neighbouring blocks are side by side. Its rows make one partial row of dbias.
template <typename Element>
__global__ void __launch_bounds__(32 * kElementwiseWarps)
    activation_backward_kernel(const __grid_constant__ LinearActivationBackward p) {
  struct Loaded {
    Raw<4> dy;
    RawPre pre;
  };
  LLMKERNELS_SHARED(shared);
  auto& of_warps = *reinterpret_cast<BiasSums(*)[kElementwiseWarps][32]>(shared);
  const int warp = threadIdx.x / kWarpThreads, lane = threadIdx.x % kWarpThreads;
  const unsigned strips = (static_cast<unsigned>(p.product.n) - 1) / kElementwiseColumns + 1;
  const int64_t partial_row = blockIdx.x / strips;
  const int64_t first_row = partial_row * kElementwiseRows + warp;
  const int column = static_cast<int>(blockIdx.x % strips) * kElementwiseColumns + 4 * lane;
  RowsAhead rows(first_row, kElementwiseWarps, [&](int64_t row) {
    const int n = row < p.product.m ? p.product.n : 0;
    const QuadView<Element> dy(p.product.a, p.is_vector);
    return Loaded{dy.load(row, column, n), load_pre<Element>(p, row, column)};
  });
  BiasSums sums;
#pragma unroll 1
  for (int i = 0; i < kElementwiseRows / kElementwiseWarps; ++i) {
    const Loaded loaded = rows.next();
    const int64_t row = first_row + i * kElementwiseWarps;
    if (row >= p.product.m || column >= p.product.n) continue;
    Quad dhidden;
    load_quad<Element>(loaded.dy, dhidden);
    finish_backward_quad<Element>(p, row, column, loaded.pre, dhidden, sums);
  }
  if (p.dbias_partial.data == nullptr) return;
  of_warps[warp][lane] = sums;
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int other = 1; other < kElementwiseWarps; ++other) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums.gate[j] += of_warps[other][lane].gate[j];
      sums.up[j] += of_warps[other][lane].up[j];
    }
  }
  store_sums(p, partial_row, column, sums);
}

__global__ void __launch_bounds__(kPartialThreads)
    bias_gradient_kernel(const __grid_constant__ LinearActivationBackward p) {
  LLMKERNELS_SHARED(shared);
  add_partial_rows(p.dbias_partial, p.partial_rows, p.dbias,
                   p.gated ? 2 * p.product.n : p.product.n, blockIdx.x, shared);
}

// The Element that ``action`` is called with, by the dtype alone and for a product.
template <typename Action>
static auto with_element(Dtype dtype, Action action) {
  if (dtype == Dtype::kFloat16) return action(Float16{});
  return dtype == Dtype::kBFloat16 ? action(BFloat16{}) : action(Float32{});
}

template <typename Action>
static auto with_element(const Product& p, Action action) {
  return p.tf32 ? action(Tf32{}) : with_element(p.a.dtype, action);
}

static bool are_quads(int32_t n, std::initializer_list<const Matrix*> operands) {
  bool aligned = n % 4 == 0;
  for (const Matrix* operand : operands) aligned = aligned && is_vector_aligned(*operand, 4);
  return aligned;
}

// Bytes of the copies that the operand's rows are aligned to; shift: elements to another place that
// rows begin at.
static int32_t copy_bytes(const Matrix& operand, int64_t shift) {
  const int64_t bytes = bytes_of(operand.dtype);
  const auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(operand.data)) |
                    operand.row_stride * bytes | shift * bytes;
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

static void set_copies(Product& p) {
  p.a_copy_bytes = copy_bytes(p.a, 0);
  p.b_copy_bytes = copy_bytes(p.b, p.paired && !p.b_along_k ? p.n : 0);
}

// Rows of the result that make one partial row of dbias.
static int rows_of_partial(const Product& p, const Device& device) {
  if (p.b.data == nullptr) return kElementwiseRows;
  return with_element(p, [&](auto element) {
    return with_product_tile<decltype(element)>(p, device,
                                                [](auto tile) { return decltype(tile)::kWarpM; });
  });
}

cudaError_t linear_activation_partial_rows(const Product& product, int32_t* partial_rows) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error == cudaSuccess)
    *partial_rows = static_cast<int32_t>(divide_up(product.m, rows_of_partial(product, device)));
  return error;
}

cudaError_t linear_activation_forward(const LinearActivationForward& arguments,
                                      cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  LinearActivationForward p = arguments;
  set_copies(p.product);
  p.is_vector = are_quads(p.product.n, {&p.bias, &p.pre, &p.hidden});
  return with_element(p.product, [&](auto element) {
    return linear_activation_forward_of<decltype(element)>(p, device, stream);
  });
}

cudaError_t linear_activation_backward(const LinearActivationBackward& arguments,
                                       cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  LinearActivationBackward p = arguments;
  const bool has_weight = p.product.b.data != nullptr;
  p.is_vector = are_quads(p.product.n, {&p.pre, &p.dpre, &p.hidden, &p.dbias_partial}) &&
                (has_weight || is_vector_aligned(p.product.a, 4));
  if (p.dbias.data != nullptr &&
      p.partial_rows != divide_up(p.product.m, rows_of_partial(p.product, device)))
    return cudaErrorInvalidValue;
  if (has_weight) {
    set_copies(p.product);
    error = with_element(p.product, [&](auto element) {
      return linear_activation_backward_of<decltype(element)>(p, device, stream);
    });
  } else {
    const int64_t blocks =
        divide_up(p.product.m, kElementwiseRows) * divide_up(p.product.n, kElementwiseColumns);
    if (blocks > kMaxBlocks) return cudaErrorInvalidConfiguration;
    const auto grid = static_cast<unsigned>(blocks);
    error = with_element(p.pre.dtype, [&](auto element) {
      return launch(activation_backward_kernel<decltype(element)>, grid, 32 * kElementwiseWarps,
                    sizeof(BiasSums[kElementwiseWarps][32]), stream, p);
    });
  }
  if (error != cudaSuccess || p.dbias.data == nullptr) return error;
  const int64_t columns = p.gated ? 2 * int64_t{p.product.n} : p.product.n;
  return launch(bias_gradient_kernel, static_cast<unsigned>(divide_up(columns, kPartialColumns)),
                kPartialThreads, kPartialSharedBytes, stream, p);
}

}  // namespace llmkernels

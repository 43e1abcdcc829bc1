// The host side of the op, and the kernel that adds up the partial rows of backward.
#include <initializer_list>

#include "../common/launch.cuh"
#include "../common/partial_rows.cuh"
#include "plan.cuh"

namespace llmkernels {

// dweight and dbias, one of the two a row of blocks.
__global__ void __launch_bounds__(kPartialThreads)
    layer_norm_finalize_kernel(const __grid_constant__ LayerNormBackward p) {
  LLMKERNELS_SHARED(shared);
  const bool is_weight = p.dweight_partial.data != nullptr && blockIdx.y == 0;
  add_partial_rows(is_weight ? p.dweight_partial : p.dbias_partial, p.partial_rows,
                   is_weight ? p.dweight : p.dbias, p.n, blockIdx.x, shared);
}

// The Element that ``action`` is called with: of ``dtype``, or any where an operand is not aligned
// to its vectors.
template <typename Action>
static auto with_element(Dtype dtype, int32_t n, std::initializer_list<const Matrix*> operands,
                         Action action) {
  const int columns = dtype == Dtype::kFloat32 ? Float32::kColumns : BFloat16::kColumns;
  bool aligned = n % columns == 0;
  for (const Matrix* operand : operands) aligned = aligned && is_vector_aligned(*operand, columns);
  if (!aligned) return action(AnyElement{});
  if (dtype == Dtype::kFloat32) return action(Float32{});
  return dtype == Dtype::kBFloat16 ? action(BFloat16{}) : action(Float16{});
}

cudaError_t layer_norm_partial_rows(int64_t m, int32_t n, Dtype dtype, int32_t* partial_rows) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  *partial_rows = with_element(dtype, n, {}, [&](auto element) {
    return static_cast<int32_t>(partial_rows_of<decltype(element)>(m, n, device));
  });
  return cudaSuccess;
}

cudaError_t layer_norm_forward(const LayerNormForward& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  return with_element(
      p.x.dtype, p.n, {&p.x, &p.residual, &p.weight, &p.bias, &p.z, &p.y},
      [&](auto element) { return layer_norm_forward_of<decltype(element)>(p, device, stream); });
}

cudaError_t layer_norm_backward(const LayerNormBackward& p, cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(&device);
  if (error != cudaSuccess) return error;
  const auto operands = {
      &p.dy, &p.dz, &p.z, &p.weight, &p.dx, &p.dresidual, &p.dweight_partial, &p.dbias_partial};
  error = with_element(p.z.dtype, p.n, operands, [&](auto element) {
    return layer_norm_backward_of<decltype(element)>(p, device, stream);
  });
  const int sums = (p.dweight_partial.data != nullptr) + (p.dbias_partial.data != nullptr);
  if (error != cudaSuccess || sums == 0) return error;
  const dim3 grid(static_cast<unsigned>(divide_up(p.n, kPartialColumns)), sums);
  return launch(layer_norm_finalize_kernel, grid, kPartialThreads, kPartialSharedBytes, stream, p);
}

}  // namespace llmkernels

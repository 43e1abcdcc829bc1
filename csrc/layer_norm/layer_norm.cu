// The host side of the op, and the kernel that adds up the partial rows of backward.
#include <initializer_list>

#include "../common/launch.cuh"
#include "plan.cuh"

namespace llmkernels {

// dweight and dbias: partial_rows rows added in a fixed order, kFinalizeColumns columns and one of
// the two a block.
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeRows)
    layer_norm_finalize_kernel(const __grid_constant__ LayerNormBackward p) {
  LLMKERNELS_SHARED(shared);
  float (*sums)[kFinalizeColumns] = reinterpret_cast<float (*)[kFinalizeColumns]>(shared);
  const bool is_weight = p.dweight_partial.data != nullptr && blockIdx.y == 0;
  const Matrix& partial = is_weight ? p.dweight_partial : p.dbias_partial;  // [partial_rows, N]
  const Matrix& total = is_weight ? p.dweight : p.dbias;                    // [N]
  const int lane = threadIdx.x % kFinalizeColumns;
  const int line = threadIdx.x / kFinalizeColumns;
  const Slot slot = slot_of<1>(blockIdx.x, kFinalizeColumns, lane, p.n);

  float sum = 0.0f;
#pragma unroll 4
  for (int row = line; row < p.partial_rows; row += kFinalizeRows) {
    float value[1];
    load_values(partial, row, slot, value);
    sum += value[0];
  }
  sums[line][lane] = sum;
  __syncthreads();
#pragma unroll
  for (int half = kFinalizeRows / 2; half > 0; half /= 2) {
    if (line < half) sums[line][lane] += sums[line + half][lane];
    __syncthreads();
  }
  if (line == 0) store_values<1>(total, 0, slot, {sums[0][lane]});
}

static cudaError_t current_device(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->block_shared_bytes,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return error;
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
  const dim3 grid(static_cast<unsigned>(divide_up(p.n, kFinalizeColumns)), sums);
  return launch(layer_norm_finalize_kernel, grid, kFinalizeColumns * kFinalizeRows,
                kFinalizeColumns * kFinalizeRows * sizeof(float), stream, p);
}

}  // namespace llmkernels

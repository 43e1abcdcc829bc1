// The Python module llmkernels._C: raw pointers, sizes, strides in elements, dtype codes (dtype.h),
// a device index and a stream handle. A null pointer is an operand that the call does not have.
// Every function raises RuntimeError.
#include "common/platform.cuh"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "attention/bindings.h"
#include "common/host.h"
#include "feed_forward/bindings.h"
#include "layer_norm/layer_norm.h"
#include "wrappers/wrappers.h"

#ifdef LLMKERNELS_EMULATOR
#include "emulator_bindings.hpp"
#endif

// As a comma-separated list: "80,90a,100,120".
#ifndef LLMKERNELS_ARCHITECTURES
#define LLMKERNELS_ARCHITECTURES ""
#endif

namespace llmkernels {
namespace {

namespace py = pybind11;

// Blocks are numbered with 31 bits, and the columns of a row with 30 so that the end of its last
// tile can be too.
void check_sizes(int64_t m, int64_t n, const char* function) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1, kMaxColumns = int64_t{1} << 30;
  if (m >= 1 && m <= kMaxRows && n >= 1 && n <= kMaxColumns) return;
  std::ostringstream text;
  text << function << ": expected 1 <= m <= " << kMaxRows << " and 1 <= n <= " << kMaxColumns
       << ", got m = " << m << " and n = " << n;
  throw std::runtime_error(text.str());
}

void forward(uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t residual,
             int64_t residual_stride, int residual_dtype, uintptr_t weight, int weight_dtype,
             uintptr_t bias, int bias_dtype, uintptr_t z, int z_dtype, uintptr_t y, int y_dtype,
             uintptr_t mean, uintptr_t rstd, uintptr_t seed, double dropout_p, int64_t m, int64_t n,
             double eps, int device, uintptr_t stream) {
  check_sizes(m, n, "layer_norm_forward");
  LayerNormForward p;
  p.x = matrix(x, x_stride, x_dtype);
  p.residual = matrix(residual, residual_stride, residual_dtype);
  p.weight = matrix(weight, 0, weight_dtype);
  p.bias = matrix(bias, 0, bias_dtype);
  p.z = matrix(z, n, z_dtype);
  p.y = matrix(y, n, y_dtype);
  p.mean = pointer<float>(mean);
  p.rstd = pointer<float>(rstd);
  p.dropout = make_dropout(pointer<const int64_t>(seed), dropout_p);
  p.m = m;
  p.n = static_cast<int32_t>(n);
  p.eps = static_cast<float>(eps);
  const DeviceGuard guard(device, "layer_norm_forward");
  const cudaError_t error = layer_norm_forward(p, pointer<CUstream_st>(stream));
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << "layer_norm_forward: " << describe(error) << " on device " << device << ", m = " << m
       << ", n = " << n << ", x " << p.x << ", residual " << p.residual << ", weight " << p.weight
       << ", bias " << p.bias << ", z " << p.z << ", y " << p.y << ", mean " << p.mean << ", rstd "
       << p.rstd << ", seed " << p.dropout.seed;
  throw std::runtime_error(text.str());
}

void backward(uintptr_t dy, int64_t dy_stride, int dy_dtype, uintptr_t dz, int64_t dz_stride,
              int dz_dtype, uintptr_t z, int64_t z_stride, int z_dtype, uintptr_t weight,
              int weight_dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dx, int dx_dtype,
              uintptr_t dresidual, int dresidual_dtype, uintptr_t dweight, uintptr_t dbias,
              int dbias_dtype, uintptr_t dweight_partial, uintptr_t dbias_partial, int partial_rows,
              uintptr_t seed, double dropout_p, int64_t m, int64_t n, int device,
              uintptr_t stream) {
  check_sizes(m, n, "layer_norm_backward");
  constexpr int kFloat32 = static_cast<int>(Dtype::kFloat32);
  LayerNormBackward p;
  p.dy = matrix(dy, dy_stride, dy_dtype);
  p.dz = matrix(dz, dz_stride, dz_dtype);
  p.z = matrix(z, z_stride, z_dtype);
  p.weight = matrix(weight, 0, weight_dtype);
  p.mean = pointer<const float>(mean);
  p.rstd = pointer<const float>(rstd);
  p.dx = matrix(dx, n, dx_dtype);
  p.dresidual = matrix(dresidual, n, dresidual_dtype);
  p.dweight = matrix(dweight, 0, weight_dtype);
  p.dbias = matrix(dbias, 0, dbias_dtype);
  p.dweight_partial = matrix(dweight_partial, n, kFloat32);
  p.dbias_partial = matrix(dbias_partial, n, kFloat32);
  p.partial_rows = partial_rows;
  p.dropout = make_dropout(pointer<const int64_t>(seed), dropout_p);
  p.m = m;
  p.n = static_cast<int32_t>(n);
  const DeviceGuard guard(device, "layer_norm_backward");
  const cudaError_t error = layer_norm_backward(p, pointer<CUstream_st>(stream));
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << "layer_norm_backward: " << describe(error) << " on device " << device << ", m = " << m
       << ", n = " << n << ", dy " << p.dy << ", dz " << p.dz << ", z " << p.z << ", weight "
       << p.weight << ", dx " << p.dx << ", dresidual " << p.dresidual << ", dweight " << p.dweight
       << ", dbias " << p.dbias << ", mean " << p.mean << ", rstd " << p.rstd << ", "
       << partial_rows << " partial rows, seed " << p.dropout.seed;
  throw std::runtime_error(text.str());
}

int partial_rows(int64_t m, int64_t n, int dtype, int device) {
  check_sizes(m, n, "layer_norm_partial_rows");
  const DeviceGuard guard(device, "layer_norm_partial_rows");
  int32_t rows = 0;
  check(layer_norm_partial_rows(m, static_cast<int32_t>(n), static_cast<Dtype>(dtype), &rows),
        "layer_norm_partial_rows");
  return rows;
}

// (name, threads, input words, output words) of each row of wrappers.h.
py::list wrapper_table() {
  py::list list;
  for (int i = 0; i < wrapper_count(); ++i) {
    const Wrapper& row = wrapper(i);
    list.append(py::make_tuple(row.name, row.threads, row.input_words, row.output_words));
  }
  return list;
}

void run_one_wrapper(const std::string& name, uintptr_t input, uintptr_t output, int device,
                     uintptr_t stream) {
  const DeviceGuard guard(device, name.c_str());
  check(run_wrapper(name.c_str(), pointer<const uint32_t>(input), pointer<uint32_t>(output),
                    pointer<CUstream_st>(stream)),
        name.c_str());
}

bool is_emulated() {
#ifdef LLMKERNELS_EMULATOR
  return true;
#else
  return false;
#endif
}

py::list architectures() {
  py::list list;
  std::istringstream names(LLMKERNELS_ARCHITECTURES);
  for (std::string name; std::getline(names, name, ',');) list.append(name);
  return list;
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "device_count");
  return count;
}

}  // namespace
}  // namespace llmkernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CUDA C++ kernels of llmkernels.";
  m.def("layer_norm_forward", &llmkernels::forward,
        "Launches one forward; operands as csrc/layer_norm/layer_norm.h.");
  m.def("layer_norm_backward", &llmkernels::backward,
        "Launches one backward; operands as layer_norm.h.");
  m.def("layer_norm_partial_rows", &llmkernels::partial_rows,
        "Rows of the partial sums that backward of [m, n] in z's dtype takes on the device.");
  llmkernels::bind_attention(m);
  llmkernels::bind_feed_forward(m);
  m.def("wrappers", &llmkernels::wrapper_table,
        "Every instruction with a kernel of its own: (name, threads, input words, output words).");
  m.def("run_wrapper", &llmkernels::run_one_wrapper,
        "Launches the kernel of one instruction; operands as csrc/wrappers/wrappers.h.");
  m.def("is_emulated", &llmkernels::is_emulated,
        "Whether the kernels run on the CPU (tests/emulator).");
  m.def("architectures", &llmkernels::architectures,
        "The GPU architectures compiled for, as ['80', '90a'].");
  m.def("device_count", &llmkernels::device_count, "GPUs that the driver offers.");
#ifdef LLMKERNELS_EMULATOR
  llmkernels::emulator::bind(m);
#endif
}

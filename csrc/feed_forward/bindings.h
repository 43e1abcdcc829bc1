// The Python functions of feed_forward.h, without a header of Python: bindings.cpp hands over its
// module.
#pragma once

#include "../common/host.h"
#include "feed_forward.h"

namespace llmkernels {

// Rows are numbered with 31 bits, the columns of a pre-activation and K with 30, so that the ends
// of their last tiles can be too. Grids have at most 65535 strips of columns.
inline void check_product(int64_t m, int64_t n, int64_t k, bool halves, const char* function) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - 1, kMaxColumns = int64_t{1} << 30;
  const int64_t width = halves ? 2 * n : n;
  if (m >= 1 && m <= kMaxRows && n >= 1 && width <= kMaxColumns && k >= 0 && k <= kMaxColumns)
    return;
  std::ostringstream text;
  text << function << ": expected 1 <= m <= " << kMaxRows << ", 1 <= width <= " << kMaxColumns
       << " and 0 <= k <= " << kMaxColumns << ", got m = " << m << ", n = " << n
       << (halves ? " in two halves" : "") << " and k = " << k;
  throw std::runtime_error(text.str());
}

inline Product product(const Matrix& a, const Matrix& b, bool b_along_k, bool paired, bool tf32,
                       int64_t m, int64_t n, int64_t k) {
  Product p;
  p.a = a;
  p.b = b;
  p.b_along_k = b_along_k;
  p.paired = paired;
  p.tf32 = tf32;
  p.m = m;
  p.n = static_cast<int32_t>(n);
  p.k = static_cast<int32_t>(k);
  return p;
}

inline std::ostream& operator<<(std::ostream& text, const Product& p) {
  return text << "m = " << p.m << ", n = " << p.n << ", k = " << p.k << ", a " << p.a << ", b "
              << p.b << (p.b_along_k ? " along k" : " along n") << (p.tf32 ? ", tf32" : "");
}

inline void bound_linear_activation_forward(int dtype, uintptr_t x, int64_t x_stride,
                                            uintptr_t weight, int64_t weight_stride, bool along_k,
                                            uintptr_t bias, uintptr_t pre, uintptr_t hidden,
                                            uintptr_t seed, double dropout_p, int activation,
                                            bool gated, bool tf32, int64_t m, int64_t n, int64_t k,
                                            int device, uintptr_t stream) {
  const char* const function = "linear_activation_forward";
  check_product(m, n, k, gated, function);
  LinearActivationForward p;
  p.product = product(matrix(x, x_stride, dtype), matrix(weight, weight_stride, dtype), along_k,
                      gated, tf32, m, n, k);
  p.bias = matrix(bias, 0, dtype);
  p.pre = matrix(pre, gated ? 2 * n : n, dtype);
  p.hidden = matrix(hidden, n, dtype);
  p.dropout = make_dropout(pointer<const int64_t>(seed), dropout_p);
  p.activation = static_cast<Activation>(activation);
  const DeviceGuard guard(device, function);
  const cudaError_t error = linear_activation_forward(p, pointer<CUstream_st>(stream));
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << function << ": " << describe(error) << " on device " << device << ", " << p.product
       << ", bias " << p.bias << ", pre " << p.pre << ", hidden " << p.hidden << ", seed "
       << p.dropout.seed << ", activation " << activation << (gated ? ", gated" : "");
  throw std::runtime_error(text.str());
}

inline void bound_linear_activation_backward(int dtype, uintptr_t dy, int64_t dy_stride,
                                             uintptr_t weight, int64_t weight_stride, bool along_k,
                                             uintptr_t pre, uintptr_t dpre, uintptr_t hidden,
                                             uintptr_t dbias, uintptr_t dbias_partial,
                                             int partial_rows, uintptr_t seed, double dropout_p,
                                             int activation, bool gated, bool tf32, int64_t m,
                                             int64_t n, int64_t k, int device, uintptr_t stream) {
  const char* const function = "linear_activation_backward";
  check_product(m, n, k, gated, function);
  LinearActivationBackward p;
  p.product = product(matrix(dy, dy_stride, dtype), matrix(weight, weight_stride, dtype), along_k,
                      false, tf32, m, n, k);
  const int64_t width = gated ? 2 * n : n;
  p.pre = matrix(pre, width, dtype);
  p.dpre = matrix(dpre, width, dtype);
  p.hidden = matrix(hidden, n, dtype);
  p.dbias = matrix(dbias, 0, dtype);
  p.dbias_partial = matrix(dbias_partial, width, static_cast<int>(Dtype::kFloat32));
  p.partial_rows = partial_rows;
  p.dropout = make_dropout(pointer<const int64_t>(seed), dropout_p);
  p.activation = static_cast<Activation>(activation);
  p.gated = gated;
  const DeviceGuard guard(device, function);
  const cudaError_t error = linear_activation_backward(p, pointer<CUstream_st>(stream));
  if (error == cudaSuccess) return;
  std::ostringstream text;
  text << function << ": " << describe(error) << " on device " << device << ", " << p.product
       << ", pre " << p.pre << ", dpre " << p.dpre << ", hidden " << p.hidden << ", dbias "
       << p.dbias << ", " << partial_rows << " partial rows, seed " << p.dropout.seed
       << ", activation " << activation << (gated ? ", gated" : "");
  throw std::runtime_error(text.str());
}

inline int bound_linear_activation_partial_rows(int dtype, bool has_weight, bool tf32, int64_t m,
                                                int64_t n, int device) {
  const char* const function = "linear_activation_partial_rows";
  check_product(m, n, 0, false, function);
  const DeviceGuard guard(device, function);
  // Any address says that there is a weight: it is not read.
  const Matrix a = matrix(0, 0, dtype), b = matrix(has_weight ? 16 : 0, 0, dtype);
  int32_t rows = 0;
  check(linear_activation_partial_rows(product(a, b, false, false, tf32, m, n, 0), &rows),
        function);
  return rows;
}

template <typename Module>
void bind_feed_forward(Module& m) {
  m.def("linear_activation_forward", &bound_linear_activation_forward,
        "Launches one forward; operands as csrc/feed_forward/feed_forward.h.");
  m.def("linear_activation_backward", &bound_linear_activation_backward,
        "Launches one backward; operands as feed_forward.h.");
  m.def("linear_activation_partial_rows", &bound_linear_activation_partial_rows,
        "Rows of the partial sums of dbias that backward of [m, n] takes on the device.");
}

}  // namespace llmkernels

// What the bindings of every op do on the host: views of raw pointers, the device of a call, errors
// as exceptions.
#pragma once

#include "platform.cuh"

#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace llmkernels {

inline std::string describe(cudaError_t error) {
  std::ostringstream text;
  text << "CUDA error " << static_cast<int>(error) << " (" << cudaGetErrorString(error) << ")";
  return text.str();
}

inline void check(cudaError_t error, const char* function) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(function) + ": " + describe(error));
}

// The tensors' device for the time of a launch, then the caller's again.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* function) {
    int current = 0;
    check(cudaGetDevice(&current), function);
    if (current == device) return;
    check(cudaSetDevice(device), function);
    previous_ = current;
  }
  ~DeviceGuard() {
    if (previous_ >= 0) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

inline Matrix matrix(uintptr_t data, int64_t row_stride, int dtype) {
  return {reinterpret_cast<void*>(data), row_stride, static_cast<Dtype>(dtype)};
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline std::ostream& operator<<(std::ostream& text, const Matrix& matrix) {
  static constexpr const char* kNames[] = {"float16", "bfloat16", "float32"};
  if (matrix.data == nullptr) return text << "none";
  return text << kNames[static_cast<int>(matrix.dtype)] << " at " << matrix.data
              << " with row stride " << matrix.row_stride;
}

}  // namespace llmkernels

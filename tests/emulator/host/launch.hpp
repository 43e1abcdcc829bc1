// csrc/common/launch.cuh: a grid runs on the calling thread, block after block, and has ended when
// launch returns.
#pragma once

#include <tuple>

#include "language.hpp"
#include "runtime.hpp"

namespace llmkernels::emulator {

using ThreadBody = void (*)(const void* argument);

// `kernel` is only remembered, as launched.
cudaError_t run_grid(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                     ThreadBody body, const void* argument);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t /*stream*/, const Arguments&... arguments) {
  const auto thread_body = [kernel, parameters = std::tuple<Parameters...>(arguments...)] {
    std::apply(kernel, parameters);
  };
  using Body = decltype(thread_body);
  return run_grid(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](const void* body) { (*static_cast<Body*>(body))(); }, &thread_body);
}

}  // namespace llmkernels::emulator

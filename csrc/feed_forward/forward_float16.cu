#include "forward.cuh"

namespace llmkernels {

template cudaError_t linear_activation_forward_of<Float16>(const LinearActivationForward&,
                                                           const Device&, cudaStream_t);

}  // namespace llmkernels

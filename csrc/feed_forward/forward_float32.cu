#include "forward.cuh"

namespace llmkernels {

template cudaError_t linear_activation_forward_of<Float32>(const LinearActivationForward&,
                                                           const Device&, cudaStream_t);
template cudaError_t linear_activation_forward_of<Tf32>(const LinearActivationForward&,
                                                        const Device&, cudaStream_t);

}  // namespace llmkernels

#include "backward.cuh"

namespace llmkernels {

template cudaError_t linear_activation_backward_of<Float32>(const LinearActivationBackward&,
                                                            const Device&, cudaStream_t);
template cudaError_t linear_activation_backward_of<Tf32>(const LinearActivationBackward&,
                                                         const Device&, cudaStream_t);

}  // namespace llmkernels

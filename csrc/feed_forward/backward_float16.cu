#include "backward.cuh"

namespace llmkernels {

template cudaError_t linear_activation_backward_of<Float16>(const LinearActivationBackward&,
                                                            const Device&, cudaStream_t);

}  // namespace llmkernels

#include "backward.cuh"

namespace llmkernels {

template cudaError_t layer_norm_backward_of<Float16>(const LayerNormBackward&, const Device&,
                                                     cudaStream_t);

}  // namespace llmkernels

#include "backward.cuh"

namespace llmkernels {

template cudaError_t layer_norm_backward_of<AnyElement>(const LayerNormBackward&, const Device&,
                                                        cudaStream_t);

}  // namespace llmkernels

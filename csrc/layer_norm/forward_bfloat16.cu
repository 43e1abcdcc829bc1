#include "forward.cuh"

namespace llmkernels {

template cudaError_t layer_norm_forward_of<BFloat16>(const LayerNormForward&, const Device&,
                                                     cudaStream_t);

}  // namespace llmkernels

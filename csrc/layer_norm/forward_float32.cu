#include "forward.cuh"

namespace llmkernels {

template cudaError_t layer_norm_forward_of<Float32>(const LayerNormForward&, const Device&,
                                                    cudaStream_t);

}  // namespace llmkernels

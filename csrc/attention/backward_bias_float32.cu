#include "backward_bias.cuh"

namespace llmkernels::attention {

template cudaError_t backward_bias_of<Float32>(const AttentionBackward&, cudaStream_t);

}  // namespace llmkernels::attention

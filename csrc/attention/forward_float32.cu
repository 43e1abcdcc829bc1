#include "forward.cuh"

namespace llmkernels::attention {

template cudaError_t forward_of<Float32>(const AttentionForward&, cudaStream_t);

}  // namespace llmkernels::attention

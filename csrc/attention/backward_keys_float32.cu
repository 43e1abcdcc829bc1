#include "backward_keys.cuh"

namespace llmkernels::attention {

template cudaError_t backward_keys_of<Float32>(const AttentionBackward&, cudaStream_t);

}  // namespace llmkernels::attention

#include "backward_keys.cuh"

namespace llmkernels::attention {

template cudaError_t backward_keys_of<BFloat16>(const AttentionBackward&, cudaStream_t);

}  // namespace llmkernels::attention

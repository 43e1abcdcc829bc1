#include "backward_queries.cuh"

namespace llmkernels::attention {

template cudaError_t backward_queries_of<Float16>(const AttentionBackward&, cudaStream_t);

}  // namespace llmkernels::attention

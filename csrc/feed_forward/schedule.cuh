// Which tile a product takes, and how many blocks share its tiles: functions of its sizes and of
// the kind of GPU.
#pragma once

#include "../common/launch.cuh"
#include "operands.cuh"

namespace llmkernels {

// As many as run at the same time.
template <typename Tile>
unsigned resident_blocks(const Product& p, const Device& device) {
  constexpr int64_t kBytes = sizeof(ProductStorage<Tile>);
  const int64_t of_processor =
      max(int64_t{1}, min(int64_t{Tile::kBlocksPerSm}, device.block_shared_bytes / kBytes));
  return static_cast<unsigned>(min(tile_count<Tile>(p), device.multiprocessors * of_processor));
}

// Calls action with the large tile, or with the small one where large ones would leave
// multiprocessors without any.
template <typename Element, typename Action>
auto with_product_tile(const Product& p, const Device& device, Action action) {
  using Large = typename ProductTiles<Element>::Large;
  using Small = typename ProductTiles<Element>::Small;
  return tile_count<Large>(p) >= device.multiprocessors ? action(Large{}) : action(Small{});
}

// For one type of element; each instantiated by a .cu file, so that they compile side by side.
template <typename Element>
cudaError_t linear_activation_forward_of(const LinearActivationForward& p, const Device& device,
                                         cudaStream_t stream);
template <typename Element>
cudaError_t linear_activation_backward_of(const LinearActivationBackward& p, const Device& device,
                                          cudaStream_t stream);

}  // namespace llmkernels

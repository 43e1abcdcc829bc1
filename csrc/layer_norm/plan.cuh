// Which tile and how many partial rows a call takes: functions of its sizes and of the kind of GPU.
#pragma once

#include <type_traits>

#include "../common/device.cuh"
#include "column_sums.cuh"
#include "layer_norm.h"
#include "tiles.h"

namespace llmkernels {

template <typename Element, typename Tile>
int backward_shared_bytes(int n) {
  return RowSum<Tile::kLanes, Tile::kIsBlock, 2>::kSharedBytes +
         2 * ColumnSums<Element, Tile>::kSharedBytesPerThread * Tile::block_threads(n);
}

// Blocks of a backward tile that an SM holds: what its registers allow for, then what its shared
// memory does, of which all but a KiB can be one block's.
template <typename Element, typename Tile>
int64_t resident_blocks(int n, const Device& device) {
  const int by_registers = Tile::kBlocksPerSm * Tile::kMaxThreads / Tile::block_threads(n);
  return min(by_registers, device.block_shared_bytes / backward_shared_bytes<Element, Tile>(n));
}

// Never fewer than the GPU has multiprocessors, if there are rows for them; beyond that only such
// partial rows as add up kMinRowsPerPartial rows.
inline int64_t partial_row_count(int64_t m, int64_t rows_per_step, int64_t resident,
                                 int64_t multiprocessors) {
  const int64_t worthwhile = max(multiprocessors, divide_up(m, kMinRowsPerPartial));
  return max(int64_t{1}, min(min(divide_up(m, rows_per_step), resident), worthwhile));
}

// Calls action(Tile{}) with the first tile that serves, action(nullptr) if rows are to be looped
// over.
template <typename Element, typename Action, typename Tile, typename... Longer>
auto with_backward_tile(TileTable<Tile, Longer...>, int n, const Device& device, Action action) {
  if (n <= Tile::kMaxColumns && resident_blocks<Element, Tile>(n, device) > 0)
    return action(Tile{});
  if constexpr (sizeof...(Longer) == 0) {
    return action(nullptr);
  } else {
    return with_backward_tile<Element>(TileTable<Longer...>{}, n, device, action);
  }
}

template <typename Element>
int64_t partial_rows_of(int64_t m, int32_t n, const Device& device) {
  return with_backward_tile<Element>(
      typename Tiles<Element::kColumns>::Backward{}, n, device, [&](auto tile) {
        using Tile = decltype(tile);
        const int64_t sms = device.multiprocessors;
        if constexpr (std::is_same_v<Tile, std::nullptr_t>) {
          const int64_t strips = divide_up(n, kStripThreads * Element::kColumns);
          return partial_row_count(m, 1, divide_up(sms * kStripBlocksPerSm, strips),
                                   divide_up(sms, strips));
        } else {
          return partial_row_count(m, Tile::kRows, sms * resident_blocks<Element, Tile>(n, device),
                                   sms);
        }
      });
}

// For one type of z (of x, forward) or, by AnyElement, for unaligned operands; each instantiated by
// a .cu file of its own so that they compile side by side.
template <typename Element>
cudaError_t layer_norm_forward_of(const LayerNormForward& p, const Device& device,
                                  cudaStream_t stream);
template <typename Element>
cudaError_t layer_norm_backward_of(const LayerNormBackward& p, const Device& device,
                                   cudaStream_t stream);

}  // namespace llmkernels

// Which rows a block owns and which tiles of the other operand it walks over.
#pragma once

#include "attention.h"

namespace llmkernels::attention {

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

inline constexpr int kUnlimited = 1 << 30;  // no limit on one side of a window

// Where a sequence begins in its tensor and how long it is.
struct Span {
  int start;
  int length;
};

__device__ __forceinline__ Span span_of(const int32_t* cu_seqlens, int sequence, int length) {
  if (cu_seqlens == nullptr) return {0, length};
  const int start = cu_seqlens[sequence];
  return {start, cu_seqlens[sequence + 1] - start};
}

// One head of one sequence.
struct Head {
  int sequence;
  int batch;  // of the tensors: 0 where sequences are packed
  int head;   // of queries
  Span queries, keys;
  int offset;  // query i stands at the position i + offset among the keys
};

__device__ __forceinline__ Head make_head(const Attention& p, int sequence, int head) {
  Head h;
  h.sequence = sequence;
  h.batch = p.cu_seqlens_q == nullptr ? sequence : 0;
  h.head = head;
  h.queries = span_of(p.cu_seqlens_q, sequence, p.length_q);
  h.keys = span_of(p.cu_seqlens_k, sequence, p.length_k);
  h.offset = p.is_bottom_right ? h.keys.length - h.queries.length : 0;
  return h;
}

// The number of query ``query`` among the rows of all heads: of lse, delta and the dropout mask.
__device__ __forceinline__ int64_t row_number(const Attention& p, const Head& head, int query) {
  return (int64_t{head.batch} * p.heads + head.head) * p.length_q + head.queries.start + query;
}

__device__ __forceinline__ bool is_in_window(const Attention& p, const Head& head, int query,
                                             int key) {
  const int position = query + head.offset;
  return key >= position - p.left && key <= position + p.right && key < head.keys.length &&
         query < head.queries.length;
}

struct Visit {
  int first;    // row of the tile
  bool is_cut;  // some key may be invisible to some query
};

// Tiles of kBlock positions of the other operand that see some of the positions first to last,
// where position x sees x - before to x + after, out of 0 to length - 1. Some of them are seen
// whole by each, the others are cut by the mask.
template <int kBlock>
struct Walk {
  int low;       // where the first tile starts
  int full_low;  // and the first whole one
  int full;      // positions in whole tiles
  int visits;    // tiles

  __device__ __forceinline__ Walk(int first, int last, int before, int after, int length,
                                  bool is_all_cut) {
    low = max(first - before, 0) / kBlock * kBlock;
    const int end = divide_up(max(min(last + after + 1, length), 0), kBlock) * kBlock;
    const int high = max(end, low);
    full_low = min(max(divide_up(max(last - before, 0), kBlock) * kBlock, low), high);
    const int full_high = max(min(first + after + 1, length), 0) / kBlock * kBlock;
    full = is_all_cut ? 0 : max(min(full_high, high) - full_low, 0);
    visits = (high - low) / kBlock;
  }

  __device__ __forceinline__ int high() const { return low + visits * kBlock; }

  // The whole tiles come first.
  __device__ __forceinline__ Visit visit(int index) const {
    const int passed = index * kBlock;
    if (passed < full) return {full_low + passed, false};
    const int first = low + passed - full;
    return {first < full_low ? first : first + full, true};
  }
};

// Of a block that owns kRows queries. Where keys to the right are hidden the last tile of queries
// has the most work: it comes first.
template <int kRows>
__device__ __forceinline__ int first_owned_query(const Attention& p, int index) {
  const int tiles = divide_up(p.max_seqlen_q, kRows);
  return (p.right < kUnlimited ? tiles - 1 - index % tiles : index % tiles) * kRows;
}

template <int kRows>
__device__ __forceinline__ Head head_of_queries(const Attention& p, int index) {
  const int pair = index / divide_up(p.max_seqlen_q, kRows);
  return make_head(p, pair / p.heads, pair % p.heads);
}

template <int kBlock, int kRows>
__device__ __forceinline__ Walk<kBlock> walk_over_keys(const Attention& p, const Head& head,
                                                       int first_query) {
  const int last = min(first_query + kRows, head.queries.length) - 1;
  return Walk<kBlock>(first_query + head.offset, last + head.offset, p.left, p.right,
                      head.keys.length, p.bias.data != nullptr);
}

}  // namespace llmkernels::attention

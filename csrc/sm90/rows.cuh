// The rows of a warpgroup as query tokens and heads.
#pragma once

#include "params.h"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// A warpgroup has 64 rows: `pack` heads side by side for each of its tokens. A thread of the wgmma accumulator holds
// two of them, 8 apart.
struct Rows {
  int tile_token;               // first of the whole tile, within the sequence
  int first_token, last_token;  // of this warpgroup
  int used;                     // rows that have a query; none or negative past the sequence's end
  int row;                      // this thread's first row; its second is 8 further
  int pack;

  __device__ Rows(const Packing& packing, const Sequence& seq, int m_tile, int warpgroup)
      : row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4), pack(packing.pack) {
    tile_token = m_tile * packing.tokens_per_tile;
    first_token = tile_token + warpgroup * packing.tokens_per_warpgroup;
    int tokens = min(packing.tokens_per_warpgroup, seq.seqlen_q - first_token);
    last_token = first_token + tokens - 1;
    used = tokens * pack;
  }

  // Of this thread's row i, 0 or 1.
  __device__ int token(int i) const { return first_token + (row + 8 * i) / pack; }
  __device__ int head(int i) const { return (row + 8 * i) % pack; }
};

}  // namespace lite_attention::sm90

// The rows of a warpgroup as query tokens and heads.
#pragma once

#include "params.h"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// A warpgroup has 64 rows: `pack` heads side by side for each of its tokens. These are the same for all its threads.
struct Rows {
  int tile_token;               // first of the whole tile, within the sequence
  int first_token, last_token;  // of this warpgroup
  int used;                     // rows that have a query; none or negative past the sequence's end

  __device__ Rows(const Packing& packing, const Sequence& seq, int m_tile, int warpgroup) {
    tile_token = m_tile * packing.tokens_per_tile;
    first_token = tile_token + warpgroup * packing.tokens_per_warpgroup;
    int tokens = min(packing.tokens_per_warpgroup, seq.seqlen_q - first_token);
    last_token = first_token + tokens - 1;
    used = tokens * packing.pack;
  }
};

// The two rows, 8 apart, that a thread of the wgmma accumulator holds. Only what takes a division to find is kept.
class ThreadRows {
 public:
  __device__ explicit ThreadRows(const Packing& packing) : token_{row(0) / packing.pack, row(1) / packing.pack} {}

  __device__ static int row(int i) { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i; }
  // Counted from the first of the warpgroup, and from the first of the pack.
  __device__ int token(int i) const { return token_[i]; }
  __device__ int head(const Packing& packing, int i) const { return row(i) - token_[i] * packing.pack; }

 private:
  int token_[2];
};

}  // namespace lite_attention::sm90

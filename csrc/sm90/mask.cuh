// Which scores of a tile are visible: causal, window and the end of the keys, one rule for all of them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// A thread of the wgmma accumulator holds two rows, 8 apart, and in each the columns 8 * v + 2 * (lane % 4) + {0, 1}.
struct Mask {
  int first_key[2], end_key[2];  // per row of this thread
  int clean_begin, clean_end;    // tiles [clean_begin, clean_end) are visible to every row of the tile of queries
  int first_valid;               // keys outside of [first_valid, seqlen_k) may be memory that nobody wrote
  int seqlen_k;

  __device__ Mask(const Lengths& lengths, const Sequence& seq, const Packing& packing, int block_n, int m_tile, int row)
      : seqlen_k(seq.seqlen_k) {
    int first_token = m_tile * packing.tokens_per_tile;
    int last_token = min(first_token + packing.tokens_per_tile, seq.seqlen_q) - 1;
    for (int i = 0; i < 2; ++i) {
      int token = first_token + (row + 8 * i) / packing.pack;
      first_key[i] = seq.first_key(lengths, token);
      end_key[i] = seq.end_key(lengths, token);
    }
    clean_begin = (seq.first_key(lengths, last_token) + block_n - 1) / block_n;
    clean_end = seq.end_key(lengths, first_token) / block_n;
    first_valid = seq.first_key(lengths, first_token);
  }

  __device__ bool needed(int n_tile) const { return n_tile < clean_begin || n_tile >= clean_end; }

  // Masked scores are replaced, never added to: what was computed from unused memory may be NaN.
  template <int kBlockN, class Scores>
  __device__ void apply(Scores& scores, int n_tile, int lane) const {
    int column0 = n_tile * kBlockN + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int lo = first_key[i] - column0, hi = end_key[i] - column0;
#pragma unroll
      for (int v = 0; v < kBlockN / 8; ++v) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int column = 8 * v + j;
          if (column < lo || column >= hi) scores(4 * v + 2 * i + j) = -INFINITY;
        }
      }
    }
  }
};

}  // namespace lite_attention::sm90

// Which scores of a tile are visible: causal, window and the end of the keys, one rule for all of them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "sm90/rows.cuh"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// What a warpgroup's rows see. A thread of the accumulator holds two of them, and in each the columns
// 8 * v + 2 * (lane % 4) + {0, 1}.
struct Mask {
  const Lengths* lengths;
  int seqlen_k;
  int position;                // the key on whose diagonal the warpgroup's first token is
  int clean_begin, clean_end;  // tiles [clean_begin, clean_end) are visible to every row of the warpgroup
  int tiles_end;               // tiles from here on are visible to none
  int first_valid;             // keys outside of [first_valid, seqlen_k) may be memory that nobody wrote

  __device__ Mask(const Lengths& lengths, const Sequence& seq, const Rows& rows, int block_n)
      : lengths(&lengths), seqlen_k(seq.seqlen_k), position(seq.position(rows.first_token)) {
    clean_begin = (seq.first_key(lengths, rows.last_token) + block_n - 1) / block_n;
    clean_end = seq.end_key(lengths, rows.first_token) / block_n;
    tiles_end = (seq.end_key(lengths, rows.last_token) + block_n - 1) / block_n;
    first_valid = seq.first_key(lengths, rows.tile_token);  // one stage of V serves all warpgroups
  }

  __device__ bool needed(int n_tile) const { return n_tile < clean_begin || n_tile >= clean_end; }

  // Masked scores are replaced, never added to: what was computed from unused memory may be NaN.
  template <int kBlockN, class Scores>
  __device__ void apply(Scores& scores, int n_tile, const ThreadRows& rows) const {
    int column0 = n_tile * kBlockN + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int diagonal = position + rows.token(i);
      const int first_key = first_seen(*lengths, diagonal), end_key = end_seen(*lengths, diagonal, seqlen_k);
      // One bit a score, 16 groups of 8 columns to a word: a test of a bit is cheaper than two comparisons.
#pragma unroll
      for (int group = 0; group < kBlockN / 8; group += 16) {
        uint32_t seen = bits_below(end_key - column0 - 8 * group);
        if (lengths->window_left >= 0) seen &= ~bits_below(first_key - column0 - 8 * group);
#pragma unroll
        for (int v = group; v < min(group + 16, kBlockN / 8); ++v) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (!(seen >> (2 * (v - group) + j) & 1)) scores(4 * v + 2 * i + j) = -INFINITY;
          }
        }
      }
    }
  }

 private:
  // Bit 2 * v + j for each column 8 * v + j, j < 2, that is below `column`.
  __device__ static uint32_t bits_below(int column) {
    column = max(0, min(column, 128));
    int count = column / 8 * 2 + min(column % 8, 2);
    return count >= 32 ? ~0u : (1u << count) - 1;
  }
};

}  // namespace lite_attention::sm90

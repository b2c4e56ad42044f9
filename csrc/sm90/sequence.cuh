// One sequence of the batch: where its queries and keys begin, how many there are, and which keys a query sees.
#pragma once

#include "params.h"

namespace lite_attention::sm90 {

struct Sequence {
  int q_begin;  // first token's index in a packed tensor, else 0
  int k_begin;
  int seqlen_q;
  int seqlen_k;

  __device__ static Sequence load(const Lengths& lengths, int batch) {
    Sequence seq;
    seq.q_begin = lengths.cu_seqlens_q ? lengths.cu_seqlens_q[batch] : 0;
    seq.seqlen_q = lengths.cu_seqlens_q ? lengths.cu_seqlens_q[batch + 1] - seq.q_begin : lengths.seqlen_q;
    seq.k_begin = lengths.cu_seqlens_k ? lengths.cu_seqlens_k[batch] : 0;
    seq.seqlen_k = lengths.seqused_k      ? lengths.seqused_k[batch]
                   : lengths.cu_seqlens_k ? lengths.cu_seqlens_k[batch + 1] - seq.k_begin
                                          : lengths.seqlen_k;
    return seq;
  }

  // The key on whose diagonal query token t stands: the last query faces the last key.
  __device__ int position(int token) const { return token + seqlen_k - seqlen_q; }

  // Query token t sees the keys [first_key(t), end_key(t)). Widened, because 1M tokens and a large window are near
  // 2^31.
  __device__ int first_key(const Lengths& lengths, int token) const {
    if (lengths.window_left < 0) return 0;
    int64_t key = int64_t{position(token)} - lengths.window_left;
    return int(max(int64_t{0}, key));
  }
  __device__ int end_key(const Lengths& lengths, int token) const {
    if (lengths.window_right < 0) return seqlen_k;
    int64_t key = int64_t{position(token)} + lengths.window_right + 1;
    return int(max(int64_t{0}, min(int64_t{seqlen_k}, key)));
  }
};

}  // namespace lite_attention::sm90

// One sequence of the batch: where its queries and keys begin, how many there are, and which keys a query sees.
#pragma once

#include "params.h"

namespace lite_attention::sm90 {

// A query on the diagonal of key `position` sees the keys [first_seen, end_seen). No sum here leaves 32 bits, however
// large the window.
__device__ inline int first_seen(const Lengths& lengths, int position) {
  return lengths.window_left < 0 || lengths.window_left >= position ? 0 : position - lengths.window_left;
}
__device__ inline int end_seen(const Lengths& lengths, int position, int seqlen_k) {
  if (lengths.window_right < 0 || lengths.window_right >= seqlen_k - 1 - position) return seqlen_k;
  return max(0, position + 1 + lengths.window_right);
}

struct Sequence {
  int q_begin;  // first token's index in a packed tensor, else 0
  int k_begin;
  int seqlen_q;
  int seqlen_k;

  // `index` is of the plan.
  __device__ static Sequence load(const Lengths& lengths, int index) {
    const int batch = lengths.lists.indices ? index / lengths.lists.heads : index;
    Sequence seq;
    seq.q_begin = lengths.cu_seqlens_q ? lengths.cu_seqlens_q[batch] : 0;
    seq.seqlen_q = lengths.cu_seqlens_q ? lengths.cu_seqlens_q[batch + 1] - seq.q_begin : lengths.seqlen_q;
    seq.k_begin = lengths.cu_seqlens_k ? lengths.cu_seqlens_k[batch] : 0;
    seq.seqlen_k = lengths.seqused_k      ? lengths.seqused_k[batch]
                   : lengths.cu_seqlens_k ? lengths.cu_seqlens_k[batch + 1] - seq.k_begin
                                          : lengths.seqlen_k;
    if (lengths.lists.indices) seq.seqlen_k = listed_keys(lengths.lists, index, seq.seqlen_k);
    return seq;
  }

  // The key on whose diagonal query token t stands: the last query faces the last key.
  __device__ int position(int token) const { return token + seqlen_k - seqlen_q; }

  // Query token t sees the keys [first_key(t), end_key(t)).
  __device__ int first_key(const Lengths& lengths, int token) const { return first_seen(lengths, position(token)); }
  __device__ int end_key(const Lengths& lengths, int token) const {
    return end_seen(lengths, position(token), seqlen_k);
  }

 private:
  // All keys of the listed pages, but of the sequence's last one those that there are. Lists that claim more than the
  // sequence has are cut short.
  __device__ static int listed_keys(const PageLists& lists, int index, int seqlen_k) {
    const int pages = min((max(seqlen_k, 0) + lists.page_size - 1) / lists.page_size, lists.max_pages);
    const int count = max(0, min(lists.counts[index], pages));
    if (count == 0) return 0;
    const int last = lists.indices[int64_t{index} * lists.max_pages + count - 1];
    return count * lists.page_size - (last == pages - 1 ? pages * lists.page_size - seqlen_k : 0);
  }
};

}  // namespace lite_attention::sm90

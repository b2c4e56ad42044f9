// What of a sequence a select call looks at.
#pragma once

#include "pages/launch.h"
#include "pages/layout.cuh"

namespace lite_attention::pages {

struct Scope {
  int q_begin, q_len, k_len;
  int pages;   // that have keys
  bool whole;  // all of them are listed

  __device__ Scope(const SelectParams& params, int batch) {
    q_begin = params.cu_seqlens_q[batch];
    // What exceeds the call's shapes is the caller's error and must not reach past the memory sized by them.
    q_len = min(params.cu_seqlens_q[batch + 1] - q_begin, params.max_seqlen_q);
    k_len = max(0, min(params.seqused_k[batch], params.max_blocks * kPage));
    pages = (k_len + kPage - 1) / kPage;
    whole = params.eps == 0.f || k_len < params.min_context || (params.whole && params.whole[batch]);
  }

  // Pages that need an estimate: the full ones.
  __device__ int estimated() const { return whole || q_len <= 0 ? 0 : k_len / kPage; }
  // Those that a query token sees all of.
  __device__ int counted(int token) const {
    const int position = k_len - q_len + token;
    return position < 0 ? 0 : (position + 1) / kPage;
  }
};

}  // namespace lite_attention::pages

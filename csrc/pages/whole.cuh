// A decode step in which every sequence lists everything. Attention then reads no lists; what is told of them is how
// many pages there are.
#pragma once

#include "pages/launch.h"
#include "pages/scope.cuh"

namespace lite_attention::pages {

__device__ inline bool step_without_lists(const SelectParams& params) { return params.listed && !*params.listed; }

// Counts, and that nothing is left out, by `threads` threads of which this is one.
__device__ inline void count_all(const SelectParams& params, int thread, int threads) {
  const int heads = params.sketches.heads_k, lists = params.batch * heads;
  for (int list = thread; list < lists; list += threads) {
    const Scope scope(params, list / heads);
    params.counts[list] = scope.q_len > 0 ? scope.pages : 0;
  }
  for (int i = thread; i < lists * params.group; i += threads) params.left_out[i] = 0.f;
}

}  // namespace lite_attention::pages

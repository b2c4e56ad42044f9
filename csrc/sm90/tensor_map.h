// TMA descriptors of Q, K and V: five dimensions, boxes of 64 columns that land as slabs under the 128-byte swizzle
// (sm90/traits.cuh).
#pragma once

#include <cuda.h>

#include "params.h"
#include "sm90/launch.h"

namespace lite_attention::sm90 {

// A tensor as (64 columns, rows, slabs of 64 columns, heads, outer), where rows are tokens and outer is the batch or
// the page. For Q the two inner dimensions are swapped to (64 columns, heads, tokens, slabs, outer), so that packed
// heads are neighbours.
struct MapSource {
  const void* data;
  ElementType element;
  int64_t tokens, heads, head_dim, outer;
  Strides strides;  // batch is the stride of `outer`
};

CUresult make_q_map(CUtensorMap& map, const MapSource& q, int box_heads, int box_tokens);
CUresult make_kv_map(CUtensorMap& map, const MapSource& kv, int box_tokens, int box_slabs);

}  // namespace lite_attention::sm90

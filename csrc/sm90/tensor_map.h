// TMA descriptors of Q, K and V: four dimensions, boxes of one slab's columns that land under the swizzle of that width
// (sm90/traits.cuh).
#pragma once

#include <cuda.h>

#include "params.h"
#include "sm90/launch.h"

namespace lite_attention::sm90 {

// A tensor as (head_dim, tokens, heads, outer), where outer is the batch or the page. For Q the two in the middle are
// swapped, so that packed heads are neighbours. Columns of a box past head_dim arrive as zeros.
struct MapSource {
  const void* data;
  ElementType element;  // where it is not FP8
  bool fp8;
  bool swizzled;  // in shared memory
  int64_t tokens, heads, head_dim, outer;
  Strides strides;  // batch is the stride of `outer`
};

// Boxes that are not swizzled land as they are, row by row: the converter gives them their swizzle.
CUresult make_q_map(CUtensorMap& map, const MapSource& q, int box_columns, int box_heads, int box_tokens);
CUresult make_kv_map(CUtensorMap& map, const MapSource& kv, int box_columns, int box_tokens);

}  // namespace lite_attention::sm90

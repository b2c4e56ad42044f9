// Sums over the lanes of a warp.
#pragma once

namespace lite_attention {

// Of this lane and those before it.
template <class Int>
__device__ inline Int inclusive_sum(Int x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Int other = __shfl_up_sync(~0u, x, step);
    if (threadIdx.x % 32 >= step) x += other;
  }
  return x;
}

}  // namespace lite_attention

// Numbers that are not finite, and sums and extremes over a warp in an order that is always the same.
#pragma once

#include <cfloat>

namespace lite_attention::pages {

constexpr float kLowest = -FLT_MAX, kLog2E = 1.4426950408889634f;

__device__ inline bool finite(float x) { return fabsf(x) <= FLT_MAX; }

__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ inline float warp_min(float x) { return -warp_max(-x); }

}  // namespace lite_attention::pages

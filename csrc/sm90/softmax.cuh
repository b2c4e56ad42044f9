// Online softmax over KV tiles (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691) for the two rows that a
// thread of the wgmma accumulator holds. A row's columns are spread over the four threads of a quad.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace lite_attention::sm90 {

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

struct OnlineSoftmax {
  // How far above the running max, in log2, scores may go before it moves (FlashAttention-4's rule for Blackwell). Probabilities then
  // reach 2^8: far from overflow in fp16 and bf16, and as precise as ever.
  static constexpr float kSlack = 8.f;

  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // Turns scores into probabilities relative to the running max; rescale is what the sums so far must be multiplied by. True where
  // any row of the warp has a rescale other than 1.
  // Four partial results each for max and sum: one chain of 32 or 64 dependent operations would be longer than the products take.
  template <class Scores>
  __device__ bool step(Scores& scores, float (&rescale)[2]) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;  // of 8 columns
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float part[4] = {row_max[i], -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
      for (int v = 0; v < kGroups; ++v) {
        part[v % 4] = fmaxf(part[v % 4], fmaxf(scores(4 * v + 2 * i), scores(4 * v + 2 * i + 1)));
      }
      float m = quad_max(fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3])));
      // A maximum that grew little need not be moved: what counts is that numbers stay in range, and normalising at the end makes it
      // exact. Rows that have seen no key keep -inf, and zero stands in so that exp2 gets -inf and not NaN.
      if ((m - row_max[i]) * scale_log2 <= kSlack) m = row_max[i];
      float offset = m == -INFINITY ? 0.f : m * scale_log2;
      rescale[i] = exp2_approx(row_max[i] * scale_log2 - offset);
      row_max[i] = m;
      float sum[4] = {row_sum[i] * rescale[i], 0.f, 0.f, 0.f};
#pragma unroll
      for (int v = 0; v < kGroups; ++v) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float p = exp2_approx(fmaf(scores(4 * v + 2 * i + j), scale_log2, -offset));
          scores(4 * v + 2 * i + j) = p;
          sum[2 * (v % 2) + j] += p;
        }
      }
      row_sum[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
    return __any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f);
  }

  // After the last tile: the factor that normalises each row, and its log-sum-exp in natural units (-inf where no key was seen).
  __device__ void finish(float softmax_scale, float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = quad_sum(row_sum[i]);
      normalise[i] = sum == 0.f ? 1.f : 1.f / sum;
      lse[i] = sum == 0.f ? -INFINITY : row_max[i] * softmax_scale + logf(sum);
    }
  }
};

}  // namespace lite_attention::sm90

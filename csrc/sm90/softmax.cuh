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
  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // Turns scores into probabilities relative to the new running max; rescale is what the sums so far must be multiplied by.
  template <class Scores>
  __device__ void step(Scores& scores, float (&rescale)[2]) {
    constexpr int kQuads = decltype(cute::size(scores))::value / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m = row_max[i];
#pragma unroll
      for (int v = 0; v < kQuads; ++v) m = fmaxf(m, fmaxf(scores(4 * v + 2 * i), scores(4 * v + 2 * i + 1)));
      m = quad_max(m);
      // A row that has seen no key yet keeps -inf; zero stands in so that exp2 gets -inf and not NaN.
      float offset = m == -INFINITY ? 0.f : m * scale_log2;
      rescale[i] = exp2_approx(row_max[i] * scale_log2 - offset);
      row_max[i] = m;
      float sum = row_sum[i] * rescale[i];
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float p = exp2_approx(fmaf(scores(4 * v + 2 * i + j), scale_log2, -offset));
          scores(4 * v + 2 * i + j) = p;
          sum += p;
        }
      }
      row_sum[i] = sum;
    }
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

// Online softmax over KV tiles (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691) for the
// two rows that a thread of the wgmma accumulator holds. A row's columns are spread over the four threads of a quad.
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
  // How far above the running max, in log2, scores may go before it moves (FlashAttention-4's rule for Blackwell). What
  // counts is that numbers stay in range; normalising at the end makes it exact. Probabilities reach 2^8, far from
  // overflow in fp16 and bf16.
  static constexpr float kSlack = 8.f;
  // Groups of 8 columns handled at a time: the maxima of one chunk, on the ALUs, run under the exponentials of the one
  // before.
  static constexpr int kChunk = 4;

  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  float row_max[2] = {-INFINITY, -INFINITY};
  float offset[2] = {
      0.f, 0.f};  // row_max * scale_log2; zero for rows that have seen no key, so that exp2 gets -inf and not NaN
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // Turns scores into probabilities relative to the running max. True where the max of any row of the warp moved: then
  // what was summed before must be multiplied by rescale.
  template <class Scores>
  __device__ bool step(Scores& scores, float (&rescale)[2]) {
    constexpr int kGroups = decltype(cute::size(scores))::value / 4;
    static_assert(kGroups % kChunk == 0);
    bool moved = false;
    float sum[2][2] = {{row_sum[0], 0.f}, {row_sum[1], 0.f}};
    rescale[0] = rescale[1] = 1.f;
#pragma unroll
    for (int chunk = 0; chunk < kGroups; chunk += kChunk) {
      float high[2] = {thread_max<0>(scores, chunk, chunk + kChunk), thread_max<1>(scores, chunk, chunk + kChunk)};
      bool over = (high[0] - row_max[0]) * scale_log2 > kSlack || (high[1] - row_max[1]) * scale_log2 > kSlack;
      if (__any_sync(~0u, over)) {
        moved = true;
        float by[2] = {raise<0>(quad_max(thread_max<0>(scores, chunk, kGroups))),
                       raise<1>(quad_max(thread_max<1>(scores, chunk, kGroups)))};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rescale[i] *= by[i];
          sum[i][0] *= by[i];
          sum[i][1] *= by[i];
        }
#pragma unroll
        for (int k = 0; k < 4 * chunk; ++k) scores(k) *= by[k / 2 % 2];
      }
#pragma unroll
      for (int k = 4 * chunk; k < 4 * (chunk + kChunk); ++k) {
        float p = exp2_approx(fmaf(scores(k), scale_log2, -offset[k / 2 % 2]));
        scores(k) = p;
        sum[k / 2 % 2][k % 2] += p;
      }
    }
    row_sum[0] = sum[0][0] + sum[0][1];
    row_sum[1] = sum[1][0] + sum[1][1];
    return moved;
  }

  // After the last tile: the factor that normalises each row, and its log-sum-exp in natural units (-inf where no key
  // was seen).
  __device__ void finish(float softmax_scale, float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = quad_sum(row_sum[i]);
      normalise[i] = sum == 0.f ? 1.f : 1.f / sum;
      lse[i] = sum == 0.f ? -INFINITY : row_max[i] * softmax_scale + logf(sum);
    }
  }

 private:
  // Largest of this thread's scores of a row in groups [begin, end).
  template <int kRow, class Scores>
  __device__ static float thread_max(const Scores& scores, int begin, int end) {
    float m = -INFINITY;
#pragma unroll
    for (int v = begin; v < end; ++v) m = fmaxf(m, fmaxf(scores(4 * v + 2 * kRow), scores(4 * v + 2 * kRow + 1)));
    return m;
  }

  // Moves a row's max to m if that is far enough above it; gives what its sums must be multiplied by.
  template <int kRow>
  __device__ float raise(float m) {
    if (!((m - row_max[kRow]) * scale_log2 > kSlack)) return 1.f;
    float before = row_max[kRow] * scale_log2;
    row_max[kRow] = m;
    offset[kRow] = m * scale_log2;
    return exp2_approx(before - offset[kRow]);
  }
};

}  // namespace lite_attention::sm90

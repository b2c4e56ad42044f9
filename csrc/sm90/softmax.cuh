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

// Probabilities come multiplied by 2^kShift.
template <int kShift>
struct OnlineSoftmax {
  // How far above the running max, in log2, scores may go before it moves (FlashAttention-4's rule for Blackwell). What
  // counts is that numbers stay in range; normalising at the end makes it exact. Probabilities reach 2^(8 + kShift),
  // which is no overflow in fp16 and bf16.
  static constexpr float kSlack = 8.f;
  static_assert(kSlack + kShift < 16, "the largest number of fp16 is just below 2^16");

  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  float row_max[2] = {-INFINITY, -INFINITY};
  // row_max * scale_log2 - kShift; zero for rows that have seen no key, so that exp2 gets -inf and not NaN
  float offset[2] = {0.f, 0.f};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // Turns scores into probabilities relative to the running max. True where the max of any row of the
  // warp moved: then what was summed before must be multiplied by rescale. Whether a row's max moves depends on that
  // row alone, so its result does not depend on the rows beside it.
  template <class Scores>
  __device__ bool step(Scores& scores, float (&rescale)[2]) {
    float high[2] = {thread_max<0>(scores), thread_max<1>(scores)};
    bool over = above_slack(high[0], 0) || above_slack(high[1], 1);
    const bool moved = __any_sync(~0u, over);
    if (moved) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rescale[i] = raise(quad_max(high[i]), i);
        row_sum[i] *= rescale[i];
      }
    }
    constexpr int kSize = decltype(cute::size(scores))::value;
#pragma unroll
    for (int k = 0; k < kSize; ++k) scores(k) = exp2_approx(fmaf(scores(k), scale_log2, -offset[k / 2 % 2]));
    float sum[2][2] = {{row_sum[0], 0.f}, {row_sum[1], 0.f}};
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[k / 2 % 2][k % 2] += scores(k);
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
      lse[i] = sum == 0.f ? -INFINITY : row_max[i] * softmax_scale + (logf(sum) - kShift * 0.6931471805599453f);
    }
  }

 private:
  // Largest of this thread's scores of a row.
  template <int kRow, class Scores>
  __device__ static float thread_max(const Scores& scores) {
    float m = fmaxf(scores(2 * kRow), scores(2 * kRow + 1));
#pragma unroll
    for (int v = 1; v < decltype(cute::size(scores))::value / 4; ++v) {
      m = fmaxf(m, fmaxf(scores(4 * v + 2 * kRow), scores(4 * v + 2 * kRow + 1)));
    }
    return m;
  }

  // False where both are -inf: their difference is NaN.
  __device__ bool above_slack(float m, int i) const { return (m - row_max[i]) * scale_log2 > kSlack; }

  // Moves a row's max to m if that is far enough above it; gives what its sums must be multiplied by.
  __device__ float raise(float m, int i) {
    if (!above_slack(m, i)) return 1.f;
    float before = row_max[i] * scale_log2;
    row_max[i] = m;
    const float after = m * scale_log2;
    offset[i] = after - kShift;
    return exp2_approx(before - after);
  }
};

}  // namespace lite_attention::sm90

// Online softmax over KV tiles (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691) for the
// two rows that a thread of the wgmma accumulator holds. A row's columns are spread over the four threads of a quad.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cute/tensor.hpp>

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

// Probabilities come multiplied by 2^kShift, and are rounded to `Weight` before PV.
template <class Weight, int kShift_>
struct OnlineSoftmax {
  static constexpr int kShift = kShift_;
  // How far above the running max, in log2, scores may go before it moves (FlashAttention-4's rule for Blackwell): as
  // far as numbers stay in range, for a weight that has little of its row's sum. The weight of a key that has much must
  // be 1, which rounding leaves as it is, so for that the max moves as soon as it is passed. Much is 2^-kShare of what
  // a thread has summed, a quarter of a row.
  static constexpr float kSlack = 3.f, kShare = 2.f;
  static_assert(kSlack + kShift < 16, "the largest number of fp16 is just below 2^16");
  static constexpr float kLn2 = 0.6931471805599453f;

  // Below all finite scores, and finite itself: a masked score's distance to it is -inf, and not NaN.
  static constexpr float kNothingSeen = -3.4e38f;

  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  // What a row's probabilities are relative to: its max in log2, less kShift.
  float offset[2] = {kNothingSeen, kNothingSeen};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()
  // The largest score of this thread's columns since the max last moved: see finish().
  float largest[2] = {-INFINITY, -INFINITY};
  // The largest weight of the next tile, in log2, for which the max stays where it is by this thread's sums.
  float limit[2];

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // log2 of the probability that a score would get now: how far it is above the row's max, plus kShift.
  __device__ float weight_log2(float score, int i) const { return fmaf(score, scale_log2, -offset[i]); }
  // A row whose max nothing comes near.
  __device__ void exclude(int i) { offset[i] = INFINITY; }

  // Before a tile, while its products are computed: what needs the sums of those before. By the bits of their exponents,
  // because the unit for logarithms is busy with exponentials.
  __device__ void set_limits() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      limit[i] = fminf(fmaxf(exponent(row_sum[i]) - kShare, float(kShift)), kSlack + kShift);
      asm volatile("" : "+f"(limit[i]));  // here, and not where it is needed
    }
  }

  // The three steps of a tile. First this thread's largest score of each row.
  template <class Scores>
  __device__ static void tile_max(const Scores& scores, float (&high)[2]) {
    high[0] = thread_max<0>(scores);
    high[1] = thread_max<1>(scores);
  }

  // Then the running max: whether that of any row of the warp moves. That of a row depends on the row alone, so its
  // result does not depend on the rows beside it: raise() moves none that would not have moved by itself.
  __device__ bool moves(const float (&high)[2]) const {
    return __any_sync(~0u, weight_log2(high[0], 0) > limit[0] || weight_log2(high[1], 1) > limit[1]);
  }
  // Where any does, what was summed before must be multiplied by rescale.
  __device__ void advance(const float (&high)[2], bool moved, float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = fmaxf(largest[i], high[i]);
    if (moved) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rescale[i] = raise(quad_max(high[i]), i);
        row_sum[i] *= rescale[i];
        if (rescale[i] != 1.f) largest[i] = high[i];
      }
    }
  }

  // Then scores become probabilities relative to it.
  template <class Scores>
  __device__ void exponentiate(Scores& scores) {
    constexpr int kSize = decltype(cute::size(scores))::value;
#pragma unroll
    for (int k = 0; k < kSize; ++k) scores(k) = exp2_approx(weight_log2(scores(k), k / 2 % 2));
    float sum[2][2] = {{row_sum[0], 0.f}, {row_sum[1], 0.f}};
#pragma unroll
    for (int k = 0; k < kSize; k += 2) sum[k / 2 % 2][k / 4 % 2] += scores(k) + scores(k + 1);
    row_sum[0] = sum[0][0] + sum[0][1];
    row_sum[1] = sum[1][0] + sum[1][1];
  }

  // After the last tile: the factor that normalises each row, and its log-sum-exp in natural units (-inf where no key
  // was seen). Where one key outweighs all others the rounding of its weight would be the error of the whole row. So
  // the largest weights count as PV had them, rounded, in what rows are divided by.
  __device__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = quad_sum(row_sum[i]);
      const float weight = exp2_approx(weight_log2(largest[i], i));
      const float rounded = sum + quad_sum(static_cast<float>(Weight(weight)) - weight);
      normalise[i] = sum == 0.f ? 1.f : __fdividef(1.f, rounded);
      lse[i] = sum == 0.f ? -INFINITY : offset[i] * kLn2 + __logf(sum);
    }
  }

 private:
  // Largest of this thread's scores of a row. Two chains, of which neither waits for its last step, and no register
  // beside them.
  template <int kRow, class Scores>
  __device__ static float thread_max(const Scores& scores) {
    float even = scores(2 * kRow), odd = scores(2 * kRow + 1);
#pragma unroll
    for (int v = 1; v < decltype(cute::size(scores))::value / 4; ++v) {
      even = fmaxf(even, scores(4 * v + 2 * kRow));
      odd = fmaxf(odd, scores(4 * v + 2 * kRow + 1));
    }
    return fmaxf(even, odd);
  }

  // floor(log2(x)) of a number that is not negative; -127 of 0.
  __device__ static float exponent(float x) {
    constexpr uint32_t kTwoTo23 = 0x4b000000;  // as a float, whose last bit is 1
    return __uint_as_float(kTwoTo23 | __float_as_uint(x) >> 23) - (8388608.f + 127.f);
  }

  // Moves a row's max to m if that is far enough above it for all threads of the row; gives what its sums must be
  // multiplied by.
  __device__ float raise(float m, int i) {
    if (!(weight_log2(m, i) > quad_max(limit[i]))) return 1.f;
    const float before = offset[i];
    offset[i] = m * scale_log2 - kShift;
    return exp2_approx(before - offset[i]);
  }
};

}  // namespace lite_attention::sm90

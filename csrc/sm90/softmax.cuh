// Online softmax over KV tiles (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691) for the
// two rows that a thread of the wgmma accumulator holds. A row's columns are spread over the four threads of a quad.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/numeric_types.h>

#include <cmath>
#include <cute/tensor.hpp>
#include <type_traits>

#include "sm90/exp2.cuh"

namespace lite_attention::sm90 {

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Probabilities come multiplied by 2^kShift, and are rounded to `Weight` before PV. Of every kPolynomialOf groups of
// four that a thread has, two of each row, one is raised by polynomial; of none with 0.
template <class Weight, int kShift, int kPolynomialOf>
struct OnlineSoftmax {
  // How far above the running max, in log2, scores may go before it moves (FlashAttention-4's rule for Blackwell). What
  // counts is that numbers stay in range, and that the weight of a row's largest key is nearly 1, which rounding leaves
  // as it is. With more slack errors grow, with less time.
  static constexpr float kSlack = 3.f;
  static_assert(kSlack + kShift < 16, "the largest number of fp16 is just below 2^16");
  static constexpr float kLn2 = 0.6931471805599453f;
  // Of the polynomial: its error is small beside the rounding of probabilities.
  static constexpr int kDegree = std::is_same_v<Weight, cutlass::half_t> ? 4 : 3;

  float scale_log2;  // softmax_scale * log2(e): one multiply-add before exp2
  float row_max[2] = {-INFINITY, -INFINITY};
  // What a row's probabilities are relative to: its max in log2, less kShift. Zero for rows that have seen no key, so
  // that exp2 gets -inf and not NaN
  float offset[2] = {0.f, 0.f};
  float row_sum[2] = {0.f, 0.f};  // of this thread's columns alone until finish()
  // The largest score of this thread's columns since the max last moved: see finish().
  float largest[2] = {-INFINITY, -INFINITY};

  __device__ explicit OnlineSoftmax(float softmax_scale) : scale_log2(softmax_scale * 1.4426950408889634f) {}

  // How far a score is above a row's max, in log2; NaN where both are -inf.
  __device__ float above(float score, int i) const { return (score - row_max[i]) * scale_log2; }

  // The three steps of a tile. First this thread's largest score of each row.
  template <class Scores>
  __device__ static void tile_max(const Scores& scores, float (&high)[2]) {
    high[0] = thread_max<0>(scores);
    high[1] = thread_max<1>(scores);
  }

  // Then the running max. True where that of any row of the warp moved: what was summed before must be multiplied by
  // rescale. Whether a row's max moves depends on that row alone, so its result does not depend on the rows beside it.
  __device__ bool advance(const float (&high)[2], float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = fmaxf(largest[i], high[i]);
    const bool moved = __any_sync(~0u, above(high[0], 0) > kSlack || above(high[1], 1) > kSlack);
    if (moved) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rescale[i] = raise(quad_max(high[i]), i);
        row_sum[i] *= rescale[i];
        if (rescale[i] != 1.f) largest[i] = high[i];
      }
    }
    return moved;
  }

  // Then scores become probabilities relative to it. Added up by pairs: a sum waits for the exponentials it is of, and
  // the fewer wait the more exponentials are under way.
  template <class Scores>
  __device__ void exponentiate(Scores& scores) {
    constexpr int kSize = decltype(cute::size(scores))::value;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const float x = fmaf(scores(k), scale_log2, -offset[k / 2 % 2]);
      scores(k) = by_polynomial(k / 4) ? exp2_polynomial<kDegree>(x) : exp2_approx(x);
    }
#pragma unroll
    for (int k = 0; k < kSize; k += 2) row_sum[k / 2 % 2] += scores(k) + scores(k + 1);
  }

  // Never, but only known when all of a tile's probabilities are: see Consumer::run. The same for all lanes.
  __device__ bool sums_are_negative() const { return __any_sync(~0u, row_sum[0] + row_sum[1] < 0.f); }

  // After the last tile: the factor that normalises each row, and its log-sum-exp in natural units (-inf where no key
  // was seen). Where one key outweighs all others the rounding of its weight would be the error of the whole row. So
  // the largest weights count as PV had them, rounded, in what rows are divided by.
  __device__ void finish(float (&normalise)[2], float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = quad_sum(row_sum[i]);
      const float weight = exp2_approx(fmaf(largest[i], scale_log2, -offset[i]));
      const float rounded = sum + quad_sum(static_cast<float>(Weight(weight)) - weight);
      normalise[i] = sum == 0.f ? 1.f : 1.f / rounded;
      lse[i] = sum == 0.f ? -INFINITY : (row_max[i] * scale_log2 - kShift) * kLn2 + logf(sum);
    }
  }

 private:
  __device__ static constexpr bool by_polynomial(int group) {
    return kPolynomialOf > 0 && group % (kPolynomialOf > 0 ? kPolynomialOf : 1) == 0;
  }

  // Largest of this thread's scores of a row.
  template <int kRow, class Scores>
  __device__ static float thread_max(const Scores& scores) {
    constexpr int kPairs = decltype(cute::size(scores))::value / 4, kChains = 2;
    float m[kChains] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int v = 0; v < kPairs; ++v) {
      m[v % kChains] = fmaxf(m[v % kChains], fmaxf(scores(4 * v + 2 * kRow), scores(4 * v + 2 * kRow + 1)));
    }
    return fmaxf(m[0], m[1]);
  }

  // Moves a row's max to m if that is far enough above it; gives what its sums must be multiplied by.
  __device__ float raise(float m, int i) {
    if (!(above(m, i) > kSlack)) return 1.f;
    const float before = row_max[i] * scale_log2;
    row_max[i] = m;
    const float after = m * scale_log2;
    offset[i] = after - kShift;
    return exp2_approx(before - after);
  }
};

}  // namespace lite_attention::sm90

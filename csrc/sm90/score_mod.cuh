// Softcap and ALiBi, on scores in registers.
#pragma once

#include "sm90/rows.cuh"

namespace lite_attention::sm90 {

__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Kernels without modifications: scores stay raw, and the softmax scales them.
template <bool kUsed>
struct ScoreModifier {
  __device__ ScoreModifier(const FwdParams&, float, const Sequence&, const Rows&, const ThreadRows&, int, int) {}
  __device__ static float softmax_scale(float scale) { return scale; }
  template <int kBlockN, class Scores>
  __device__ void apply(Scores&, int, int) const {}
};

// Kernels with them: scores leave as final logits, which the softmax does not scale again.
template <>
struct ScoreModifier<true> {
  float scale;                  // softmax_scale, or softmax_scale / softcap
  float softcap;                // zero is none
  float slope[2] = {0.f, 0.f};  // of this thread's two rows
  int position[2];              // the key on whose diagonal each row is

  __device__ ScoreModifier(const FwdParams& params, float softmax_scale, const Sequence& seq, const Rows& rows,
                           const ThreadRows& thread_rows, int batch, int first_head)
      : softcap(params.score_mod.softcap) {
    scale = softcap > 0.f ? softmax_scale / softcap : softmax_scale;
    for (int i = 0; i < 2; ++i) {
      position[i] = seq.position(rows.first_token + thread_rows.token(i));
      if (params.score_mod.slopes) {
        slope[i] = params.score_mod.slopes[batch * params.score_mod.slopes_batch_stride + first_head +
                                           thread_rows.head(params.packing, i)];
      }
    }
  }

  __device__ static float softmax_scale(float) { return 1.f; }

  template <int kBlockN, class Scores>
  __device__ void apply(Scores& scores, int n_tile, int lane) const {
    int column0 = n_tile * kBlockN + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < decltype(cute::size(scores))::value; ++k) {
      int i = k / 2 % 2, column = column0 + k / 4 * 8 + k % 2;
      float logit = scores(k) * scale;
      if (softcap > 0.f) logit = softcap * tanh_approx(logit);
      scores(k) = logit - slope[i] * fabsf(float(position[i] - column));
    }
  }
};

}  // namespace lite_attention::sm90

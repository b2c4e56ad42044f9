// The factors that FP8 operands are stored under. They are the same for all of a tile's keys and rows, so they fold
// into the scale of the scores and the normalisation of the output.
#pragma once

#include "params.h"
#include "sm90/scheduler.cuh"

namespace lite_attention::sm90 {

template <class Traits>
class Descales {
 public:
  __device__ Descales(const FwdParams& params, const Work& work) {
    if constexpr (Traits::kConverterWarps > 0) {
      const int kv_head = params.packing.kv_head(work.head_tile);
      scores_ = load(params.k_descale, work.batch, kv_head);
      if constexpr (sizeof(typename Traits::Query) == 1) scores_ *= load(params.q_descale, work.batch, kv_head);
      values_ = load(params.v_descale, work.batch, kv_head);
    }
  }

  __device__ float scores() const { return scores_; }
  __device__ float values() const { return values_; }

 private:
  __device__ static float load(const Descale& descale, int batch, int kv_head) {
    return descale.factors ? descale.factors[batch * descale.batch_stride + kv_head * descale.head_stride] : 1.f;
  }

  float scores_ = 1.f, values_ = 1.f;
};

}  // namespace lite_attention::sm90

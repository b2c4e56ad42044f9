// Rings of shared-memory stages between producers and consumers.
#pragma once

#include <cstdint>

#include "sm90/scheduler.cuh"

namespace lite_attention::sm90 {

// Where one side stands in the ring. A consumer waits for a stage's full barrier with `phase`, the producer for its
// empty barrier with `phase ^ 1`, so that its first round finds all stages free.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The ring by which the scheduling warp tells all other warps of the block what to work on.
template <class Traits>
class WorkRing {
 public:
  __device__ explicit WorkRing(typename Traits::SharedStorage& smem) : smem_(smem) {}

  __device__ void put(const Work& work) {
    smem_.work_empty[ring_.stage].wait(ring_.phase ^ 1);
    if (threadIdx.x % 32 == 0) {
      smem_.work[ring_.stage] = work;
      smem_.work_full[ring_.stage].arrive();
    }
    ring_.advance();
  }

  // All lanes of a warp together.
  __device__ Work get() {
    smem_.work_full[ring_.stage].wait(ring_.phase);
    Work work = smem_.work[ring_.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) smem_.work_empty[ring_.stage].arrive();
    ring_.advance();
    return work;
  }

 private:
  typename Traits::SharedStorage& smem_;
  Ring<Traits::kWorkStages> ring_;
};

}  // namespace lite_attention::sm90

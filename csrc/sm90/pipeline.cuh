// A ring of shared-memory stages between the producer and the consumers.
#pragma once

#include <cstdint>

namespace lite_attention::sm90 {

// Where one side stands in the ring. A consumer waits for a stage's full barrier with `phase`, the producer for its empty barrier
// with `phase ^ 1`, so that its first round finds all stages free.
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

}  // namespace lite_attention::sm90

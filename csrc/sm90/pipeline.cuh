// Rings of shared-memory stages between producers and consumers.
#pragma once

#include <cstdint>

#include "sm90/cluster.cuh"
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

// The ring by which the scheduling warp, in the first block of a cluster, tells all other warps of all blocks what to
// work on.
template <class Traits>
class WorkRing {
  using Blocks = Cluster<Traits::kCluster>;
  static constexpr int kWords = sizeof(Work) / sizeof(int);
  static_assert(kWords <= 32 && sizeof(Work) % sizeof(int) == 0, "a lane has one word");

 public:
  __device__ explicit WorkRing(typename Traits::SharedStorage& smem) : smem_(smem) {}

  __device__ void put(const Work& work) {
    smem_.work_empty[ring_.stage].wait(ring_.phase ^ 1);
    // Not known before it is asked for: else the word is found ahead of the loop that ends up here, in the way of its
    // first loads.
    int lane = threadIdx.x % 32;
    asm volatile("" : "+r"(lane));
    int words[kWords], word = 0;
    memcpy(words, &work, sizeof(Work));
#pragma unroll
    for (int i = 0; i < kWords; ++i) word = lane == i ? words[i] : word;
#pragma unroll
    for (int block = 0; block < Traits::kCluster; ++block) {
      if (lane < kWords) Blocks::store(reinterpret_cast<int*>(&smem_.work[ring_.stage]) + lane, word, block);
    }
    __syncwarp();
    if (lane < Traits::kCluster) Blocks::arrive_after_store(smem_.work_full[ring_.stage], lane);
    ring_.advance();
  }

  // The rest is for the receiving warps, all lanes of one together. The next item, whose slot stays until `release`.
  __device__ Work get() {
    Blocks::wait(smem_.work_full[ring_.stage], ring_.phase);
    const Work work = read(ring_.stage);
    ring_.advance();
    return work;
  }
  // Instead of `get` and `release`, for a warp that knows the next item already.
  __device__ void pass() {
    ring_.advance();
    release();
  }
  // The oldest item that was not released, once more: cheaper than registers to keep it in.
  __device__ Work oldest() const { return read(released_.stage); }
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) Blocks::arrive(smem_.work_empty[released_.stage], 0);
    released_.advance();
  }

 private:
  // Each word comes to all lanes by a shuffle, not by a load of their own: that tells ptxas that it is the same in the
  // whole warp, and it keeps ring stages and descriptors in uniform registers. Without, every wgmma waits for moves
  // from vector registers.
  __device__ Work read(int stage) const {
    const int lane = threadIdx.x % 32;
    const int word = lane < kWords ? reinterpret_cast<const int*>(&smem_.work[stage])[lane] : 0;
    int words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(~0u, word, i);
    Work work;
    memcpy(&work, words, sizeof(Work));
    return work;
  }

  typename Traits::SharedStorage& smem_;
  Ring<Traits::kWorkStages> ring_, released_;
};

}  // namespace lite_attention::sm90

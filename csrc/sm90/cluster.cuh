// Thread blocks of a cluster: their barriers in each other's shared memory.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

namespace lite_attention::sm90 {

// The blocks that share every K and V tile: each loads a part of it into the shared memory of all.
template <int kSize>
struct Cluster {
  using Barrier = cutlass::arch::ClusterBarrier;

  __device__ static int rank() { return kSize == 1 ? 0 : int(cute::block_rank_in_cluster()); }
  // Which cluster this is: a cluster is what the plan deals work to.
  __device__ static int worker() { return blockIdx.x / kSize; }
  __device__ static int workers() { return gridDim.x / kSize; }

  // Every thread of every block: what was written to shared memory before is seen after.
  __device__ static void sync() {
    if constexpr (kSize == 1) {
      __syncthreads();
    } else {
      cute::cluster_arrive();
      cute::cluster_wait();
    }
  }

  // Arrives at the barrier at this address in one block, when this block has read what it guards.
  __device__ static void arrive(Barrier& barrier, int block) {
    if constexpr (kSize == 1) {
      barrier.arrive();
    } else {
      barrier.arrive(block);
    }
  }

  // The same, when what was written with `store` is to be seen there: a fence of the whole GPU, so not for inner loops.
  __device__ static void arrive_after_store(Barrier& barrier, int block) {
    if constexpr (kSize == 1) {
      barrier.arrive();
    } else {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(map(&barrier, block))
                   : "memory");
    }
  }

  // Waits for what other blocks wrote before they arrived.
  __device__ static void wait(Barrier& barrier, uint32_t phase) {
    if constexpr (kSize == 1) {
      barrier.wait(phase);
    } else {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "again:\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
          "@done bra.uni over;\n"
          "bra.uni again;\n"
          "over:\n"
          "}\n" ::"r"(cute::cast_smem_ptr_to_uint(&barrier)),
          "r"(phase)
          : "memory");
    }
  }

  // Writes a word to this address in one block.
  __device__ static void store(int* word, int value, int block) {
    if constexpr (kSize == 1) {
      *word = value;
    } else {
      asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(map(word, block)), "r"(value) : "memory");
    }
  }

 private:
  __device__ static uint32_t map(const void* pointer, int block) {
    return cute::set_block_rank(cute::cast_smem_ptr_to_uint(pointer), block);
  }
};

}  // namespace lite_attention::sm90

// What the blocks of a cluster send each other: words, which land in the receiver's shared memory and are counted there
// by a barrier. Unlike a barrier of the cluster that orders memory it takes no fence, which would wait for everything
// that a thread has ever written.
#pragma once

#include <cstdint>

namespace lite_attention::pages {

// One kind of message, of which every block sends one to each, itself included, and waits for those of all.
class Exchange {
 public:
  __device__ Exchange(uint64_t& arrivals, int blocks) : arrivals_(address(&arrivals)), blocks_(blocks) {}

  // By one thread, before the blocks of the cluster have met.
  __device__ void init() const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(arrivals_), "r"(blocks_) : "memory");
  }
  // After that, by the same thread.
  __device__ static void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

  // Puts x where `here` is in the block's shared memory, as part of this block's message to it.
  __device__ void send(int block, uint4* here, uint4 x) const {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
            in_block(address(here), block)),
        "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(in_block(arrivals_, block))
        : "memory");
  }
  template <class Word>
  __device__ void send(int block, Word* here, Word x) const {
    static_assert(sizeof(Word) == 4, "a word has 32 bits");
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     in_block(address(here), block)),
                 "r"(x), "r"(in_block(arrivals_, block))
                 : "memory");
  }
  // By one thread for each block: how many bytes this block's message to it has.
  __device__ void close(int block, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(in_block(arrivals_, block)),
                 "r"(bytes)
                 : "memory");
  }

  // By all threads that read what was sent. It acquires for the block alone: what other blocks send arrives in this
  // one's shared memory before it is counted, and to acquire for the cluster would empty the L1 cache.
  __device__ void wait() {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(arrivals_),
        "r"(phase_)
        : "memory");
    phase_ ^= 1;
  }

 private:
  __device__ static uint32_t address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }
  __device__ static uint32_t in_block(uint32_t address, int block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
  }

  const uint32_t arrivals_;
  const int blocks_;
  uint32_t phase_ = 0;
};

}  // namespace lite_attention::pages

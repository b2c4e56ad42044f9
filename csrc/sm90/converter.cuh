// The converter warps of kernels over FP8 keys and values: they turn each tile that TMA brought into the 16-bit tile
// that the consumers wait for. Where queries are FP8 too, keys stay as they are.
#pragma once

#include "sm90/e4m3.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/producer.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

template <class Traits>
class Converter {
  using Storage = typename Traits::SharedStorage;
  using FullBarrier = typename Traits::FullBarrier;
  using EmptyBarrier = typename Traits::EmptyBarrier;
  static constexpr int kThreads = 32 * Traits::kConverterWarps;

 public:
  // The barriers of what TMA fills; those of the stages are the kernel's own.
  __device__ static void init(const FwdParams& params, Storage& smem) {
    auto init = [&](const typename Traits::Loads& loads) {
      for (int stage = 0; stage < Traits::kLoadStages; ++stage) {
        loads.full[stage].init(load_warps<Traits>(params));
        loads.empty[stage].init(Traits::kConverterWarps);
      }
    };
    if constexpr (Traits::kConvertsKeys) init(Traits::k_loads(smem));
    init(Traits::v_loads(smem));
  }

  __device__ explicit Converter(Storage& smem) : smem_(smem) {}

  // The order is that in which the consumers want tiles: K is one ahead of V.
  __device__ void run() {
    WorkRing<Traits> ring_work(smem_);
    Rings k, v;
    while (true) {
      const Work work = ring_work.get();
      ring_work.release();
      if (work.parts == 0) break;
      for (int n = work.n_begin; n < work.n_end; ++n) {
        if constexpr (Traits::kConvertsKeys) convert_k(k);
        if (!Traits::kConvertsKeys || n > work.n_begin) convert_v(v);
      }
      if (Traits::kConvertsKeys && work.n_begin < work.n_end) convert_v(v);
    }
  }

 private:
  struct Rings {
    Ring<Traits::kLoadStages> from;
    Ring<Traits::kStages> to;
  };

  __device__ void convert_k(Rings& rings) const {
    convert(Traits::k_loads(smem_), smem_.k, smem_.k_full, smem_.k_empty, rings, typename Traits::Element{});
  }
  __device__ void convert_v(Rings& rings) const {
    convert(Traits::v_loads(smem_), smem_.v, smem_.v_full, smem_.v_empty, rings, typename Traits::Value{});
  }

  static constexpr int kTile = Traits::kBlockN * Traits::kHeadDim;
  static constexpr int kVectors = kTile / 16 / kThreads;  // of 16 values, a thread
  static_assert(kTile % (16 * kThreads) == 0, "all threads have the same number of vectors");
  static constexpr int kAtOnce = [] {
    int vectors = Traits::kConvertAtOnce;
    while (kVectors % vectors != 0) --vectors;
    return vectors;
  }();

  // Both tiles are [slabs][rows][columns], so 16 values at i become 32 bytes at 2 * i; the swizzle moves 16 of these
  // bytes within their row. Neighbouring lanes read neighbouring vectors, and the swizzle spreads what eight of them
  // write over all banks.
  template <class Element>
  __device__ static void convert(const typename Traits::Loads& loads, const void* tiles, FullBarrier* full,
                                 EmptyBarrier* empty, Rings& rings, Element) {
    const int thread = threadIdx.x % kThreads;
    static_assert(32 * kThreads % 1024 == 0, "the swizzle is the same for all vectors of a thread");
    const int swizzled = Swizzle<Traits::kRowBytes == 128 ? 3 : 2, 4, 3>{}(32 * thread);
    uint32_t from = cast_smem_ptr_to_uint(loads.tiles) + rings.from.stage * kTile + 16 * thread;
    uint32_t to = cast_smem_ptr_to_uint(tiles) + rings.to.stage * kTile * 2 + swizzled;

    loads.full[rings.from.stage].wait(rings.from.phase);
    empty[rings.to.stage].wait(rings.to.phase ^ 1);
#pragma unroll 1
    for (int done = 0; done < kVectors; done += kAtOnce) {
      uint32_t loaded[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load(loaded[i], from + i * 16 * kThreads);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        uint32_t pairs[4][2];
#pragma unroll
        for (int word = 0; word < 4; ++word) from_e4m3<Element>(loaded[i][word], pairs[word]);
        store(to + i * 32 * kThreads, pairs[0], pairs[1]);
        store((to ^ 16) + i * 32 * kThreads, pairs[2], pairs[3]);
      }
      from += kAtOnce * 16 * kThreads;
      to += kAtOnce * 32 * kThreads;
    }
    // wgmma reads by the async proxy what these threads have written.
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      loads.empty[rings.from.stage].arrive();
      full[rings.to.stage].arrive();
    }
    rings.from.advance();
    rings.to.advance();
  }

  // By address: through pointers, which come from a reference to all of shared memory, accesses would be generic.
  __device__ static void load(uint32_t (&words)[4], uint32_t from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
  __device__ static void store(uint32_t to, const uint32_t (&first)[2], const uint32_t (&second)[2]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(first[0]), "r"(first[1]), "r"(second[0]),
                 "r"(second[1])
                 : "memory");
  }

  Storage& smem_;
};

}  // namespace lite_attention::sm90

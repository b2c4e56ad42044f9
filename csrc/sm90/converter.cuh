// The converter warps of kernels over FP8 keys and values: they turn each tile that TMA brought into the 16-bit tile
// that the consumers wait for. Two warps convert K and two V, each pair at its own pace.
#pragma once

#include "sm90/e4m3.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

template <class Traits>
class Converter {
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  using Tiles = TileRing<Element, typename Traits::FullBarrier, typename Traits::EmptyBarrier>;
  static constexpr int kWarps = Traits::kConverterWarps / 2;
  static constexpr int kThreads = 32 * kWarps;

 public:
  // The barriers of what TMA fills; the consumers' own are the kernel's.
  __device__ static void init(Storage& smem) {
    for (const auto& loads : {Traits::k_loads(smem), Traits::v_loads(smem)}) {
      for (int stage = 0; stage < Traits::kLoadStages; ++stage) {
        loads.full[stage].init(Traits::kLoadWarps);
        loads.empty[stage].init(kWarps);
      }
    }
  }

  __device__ explicit Converter(Storage& smem) : smem_(smem) {}

  __device__ void run() {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    WorkRing<Traits> ring_work(smem_);
    const bool is_v = warp >= kWarps;
    const auto from = is_v ? Traits::v_loads(smem_) : Traits::k_loads(smem_);
    const Tiles to = is_v ? Tiles{smem_.v_full, smem_.v_empty, smem_.v} : Tiles{smem_.k_full, smem_.k_empty, smem_.k};
    // Addresses of shared memory: by the pointers, of which there are two to choose from, accesses would be generic.
    const uint32_t from_tiles = cast_smem_ptr_to_uint(from.tiles), to_tiles = cast_smem_ptr_to_uint(to.tiles);
    Ring<Traits::kLoadStages> ring_from;
    Ring<Traits::kStages> ring_to;
    while (true) {
      const Work work = ring_work.get();
      if (work.parts == 0) break;
      for (int n = work.n_begin; n < work.n_end; ++n) {
        from.full[ring_from.stage].wait(ring_from.phase);
        to.empty[ring_to.stage].wait(ring_to.phase ^ 1);
        convert(from_tiles + ring_from.stage * kTile, to_tiles + ring_to.stage * kTile * sizeof(Element));
        // wgmma reads by the async proxy what these threads have written.
        cutlass::arch::fence_view_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
          from.empty[ring_from.stage].arrive();
          to.full[ring_to.stage].arrive();
        }
        ring_from.advance();
        ring_to.advance();
      }
    }
  }

 private:
  static constexpr int kTile = Traits::kBlockN * Traits::kHeadDim;
  static constexpr int kVectors = kTile / 16 / kThreads;  // of 16 values, a thread
  static constexpr int kAtOnce = kVectors % 4 == 0 ? 4 : 3;
  static_assert(kTile % (16 * kThreads) == 0 && kVectors % kAtOnce == 0, "all threads have the same number of vectors");

  // Both tiles are [slabs][rows][columns], so 16 values at i become 32 bytes at 2 * i; the swizzle moves 16 of these
  // bytes within their row. Neighbouring lanes read neighbouring vectors, and the swizzle spreads what eight of them
  // write over all banks.
  __device__ static void convert(uint32_t from, uint32_t to) {
    const int thread = threadIdx.x % kThreads;
    static_assert(32 * kThreads % 1024 == 0, "the swizzle is the same for all vectors of a thread");
    from += 16 * thread;
    to += Swizzle<Traits::kRowBytes == 128 ? 3 : 2, 4, 3>{}(32 * thread);
    FromE4M3<Element> convert;
#pragma unroll 1
    for (int done = 0; done < kVectors; done += kAtOnce) {
      uint32_t loaded[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load(loaded[i], from + i * 16 * kThreads);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        uint32_t pairs[8];
        convert.convert(loaded[i], pairs);
        store(to + i * 32 * kThreads, &pairs[0]);
        store((to ^ 16) + i * 32 * kThreads, &pairs[4]);
      }
      from += kAtOnce * 16 * kThreads;
      to += kAtOnce * 32 * kThreads;
    }
    if (convert.missed_nan()) restore_nan(from - kVectors * 16 * kThreads, to - kVectors * 32 * kThreads);
  }

  // Goes once more over a thread's part of a tile.
  __device__ static void restore_nan(uint32_t from, uint32_t to) {
#pragma unroll 1
    for (int i = 0; i < 16 * kVectors; ++i) {
      const int vector = i / 16, value = i % 16;
      uint16_t byte;
      asm volatile("ld.shared.u8 %0, [%1];" : "=h"(byte) : "r"(from + vector * 16 * kThreads + value));
      if ((byte & 0x7f) != 0x7f) continue;
      const uint32_t at = (value < 8 ? to : to ^ 16) + vector * 32 * kThreads + value % 8 * 2;
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(FromE4M3<Element>::kNaN) : "memory");
    }
  }

  __device__ static void load(uint32_t (&words)[4], uint32_t from) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
  __device__ static void store(uint32_t to, const uint32_t* words) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  }

  Storage& smem_;
};

}  // namespace lite_attention::sm90

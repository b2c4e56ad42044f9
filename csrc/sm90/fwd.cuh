// The forward kernel: one producer warpgroup, the consumers, and a converter where V is FP8, persistent over the plan's
// work.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "dependent_launch.cuh"
#include "sm90/consumer.cuh"
#include "sm90/converter.cuh"
#include "sm90/launch.h"
#include "sm90/producer.cuh"

namespace lite_attention::sm90 {

// Metadata made for other heads, head_dim or max_seqlen_q than this call's. Only the device can see it, and to run on
// would be silent garbage; a message would be a function call, which makes ptxas serialise every wgmma of the kernel.
template <class Traits>
__device__ void trap_at_foreign_plan(const FwdParams& params) {
  const PlanHeader& plan = *Plan(params.plan).header;
  if (plan.block_m != Traits::kBlockM || plan.block_n != Traits::kBlockN || plan.pack != params.packing.pack ||
      plan.num_workers != Cluster<Traits::kCluster>::workers()) {
    __trap();
  }
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void fwd_kernel(const __grid_constant__ FwdParams params) {
  extern __shared__ uint8_t raw_smem[];
  auto& smem =
      *reinterpret_cast<typename Traits::SharedStorage*>((reinterpret_cast<uintptr_t>(raw_smem) + 1023) / 1024 * 1024);

  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&params.map_q, &params.map_k, &params.map_v}) {
      prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(map));
    }
    constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      smem.q_full[warpgroup].init(1);
      smem.q_empty[warpgroup].init(4);  // warps
    }
    const int k_warps = Traits::kConvertsKeys ? Traits::kConverterWarps : load_warps<Traits>(params);
    const int v_warps = Traits::kConverterWarps > 0 ? Traits::kConverterWarps : load_warps<Traits>(params);
    for (int stage = 0; stage < Traits::kKeyStages; ++stage) {
      smem.k_full[stage].init(k_warps);
      smem.k_empty[stage].init(kConsumerWarps * Traits::kCluster);
      if (stage >= Traits::kStages) continue;
      smem.v_full[stage].init(v_warps);
      smem.v_empty[stage].init(kConsumerWarps * Traits::kCluster);
    }
    for (int stage = 0; stage < Traits::kWorkStages; ++stage) {
      smem.work_full[stage].init(1);
      smem.work_empty[stage].init(
          (kConsumerWarps + Traits::kConverterWarps + Traits::kProducerWarps) * Traits::kCluster - 1);
    }
    smem.work_wanted.init(1);
    if constexpr (Traits::kSkip) ListKeeper<Traits>::init(smem);
    if constexpr (Traits::kConverterWarps > 0) Converter<Traits>::init(params, smem);
    cutlass::arch::fence_barrier_init();
  }
  if (!Traits::kMoveRegisters && threadIdx.x == 32) Plan::prefetch(params.plan, params.num_workers, blockIdx.x);
  // In a decode step the planning warp waits, if at all, for lists (page_scheduler.cuh); all else is there.
  const bool listed = walks_lists<Traits>(params), in_step = Traits::kPageLists && params.in_step;
  if (!in_step) wait_for_kernels_before();
  let_next_kernel_wait();
  Cluster<Traits::kCluster>::sync();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (Traits::kConverterWarps > 0 && warpgroup > Traits::kConsumerWarpgroups) {
    if constexpr (Traits::kConverterWarps > 0) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kConverterRegisters>();
      Converter<Traits>(smem).run();
    }
  } else if (warpgroup == 0) {
    if constexpr (Traits::kMoveRegisters) cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    // Nothing waits for this thread's look at the plan: the first warp reads it at the same time.
    if (threadIdx.x == 96) trap_at_foreign_plan<Traits>(params);
    produce<Traits>(params, smem, cutlass::canonical_warp_idx_sync(), listed);
  } else {
    if constexpr (Traits::kMoveRegisters) cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(params, smem).run();
  }
  // Until here others may arrive at this block's barriers.
  if constexpr (Traits::kCluster > 1) Cluster<Traits::kCluster>::sync();
  if (in_step && !listed) end_after_kernels_before();
}

template <class Traits>
cudaError_t launch(const FwdParams& params, cudaStream_t stream) {
  auto* kernel = &fwd_kernel<Traits>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::kSmemBytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, params.num_workers * Traits::kCluster, Traits::kThreads, Traits::kSmemBytes, stream,
                          Traits::kCluster, params);
}

template <class Element, int kHeadDim, TileKind kKind, bool kScoreMod>
Kernel make_kernel() {
  using T = Traits<Element, kHeadDim, typename TileShape<kHeadDim, kKind>::Type, kScoreMod, kKind == TileKind::kSkip>;
  return {{kHeadDim, T::kBlockM, T::kBlockN, T::kCluster, T::kSlabColumns, T::kBoxRows}, launch<T>};
}

template <class Element, int kHeadDim>
Kernel select_kernel(TileKind kind, bool score_mod) {
  auto select = [&](auto tile) {
    constexpr TileKind kKind = decltype(tile)::value;
    return score_mod ? make_kernel<Element, kHeadDim, kKind, true>() : make_kernel<Element, kHeadDim, kKind, false>();
  };
  switch (kind) {
    case TileKind::kSkip:
      return score_mod ? Kernel{} : make_kernel<Element, kHeadDim, TileKind::kSkip, false>();
    case TileKind::kDecode:
      return select(std::integral_constant<TileKind, TileKind::kDecode>{});
    case TileKind::kPaged:
      return select(std::integral_constant<TileKind, TileKind::kPaged>{});
    case TileKind::kFull:
      return select(std::integral_constant<TileKind, TileKind::kFull>{});
    default:
      return select(std::integral_constant<TileKind, TileKind::kPrefill>{});
  }
}

}  // namespace lite_attention::sm90

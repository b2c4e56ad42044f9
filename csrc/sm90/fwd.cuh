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

// By one warp, for all of the block.
template <class Traits>
__device__ void init_barriers(const FwdParams& params, typename Traits::SharedStorage& smem) {
  constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
  const int lane = threadIdx.x % 32;
  auto init = [&](auto& barriers, int arrivals) {
    if (lane < int(sizeof(barriers) / sizeof(barriers[0]))) barriers[lane].init(arrivals);
  };
  init(smem.q_full, 1);
  init(smem.q_empty, 4);  // warps
  init(smem.k_full, Traits::kConvertsKeys ? Traits::kConverterWarps : load_warps<Traits>(params));
  init(smem.k_empty, kConsumerWarps * Traits::kCluster);
  init(smem.v_full, Traits::kConverterWarps > 0 ? Traits::kConverterWarps : load_warps<Traits>(params));
  init(smem.v_empty, kConsumerWarps * Traits::kCluster);
  init(smem.work_full, 1);
  init(smem.work_empty, (kConsumerWarps + Traits::kConverterWarps + Traits::kProducerWarps) * Traits::kCluster - 1);
  if (lane == 0) {
    smem.work_wanted.init(1);
    if constexpr (Traits::kSkip) ListKeeper<Traits>::init(smem);
    if constexpr (Traits::kConverterWarps > 0) Converter<Traits>::init(params, smem);
  }
  cutlass::arch::fence_barrier_init();
  __syncwarp();
}

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, 1) void fwd_kernel(const __grid_constant__ FwdParams params) {
  extern __shared__ uint8_t raw_smem[];
  auto& smem =
      *reinterpret_cast<typename Traits::SharedStorage*>((reinterpret_cast<uintptr_t>(raw_smem) + 1023) / 1024 * 1024);

  // By a consumer warp: a decode step's producers look for their first item meanwhile.
  if (threadIdx.x / 32 == Traits::kProducerWarps) init_barriers<Traits>(params, smem);
  if (threadIdx.x == 64) {
    for (const CUtensorMap* map : {&params.map_q, &params.map_k, &params.map_v}) {
      prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(map));
    }
  }
  if (!Traits::kMoveRegisters && threadIdx.x == 32) Plan::prefetch(params.plan, params.num_workers, blockIdx.x);
  // In a decode step the planning warp waits, if at all, for lists (page_scheduler.cuh); all else is there.
  const bool listed = walks_lists<Traits>(params), in_step = Traits::kPageLists && params.in_step;
  if (!in_step) wait_for_kernels_before();
  let_next_kernel_wait();
  if constexpr (Traits::kMoveRegisters) Cluster<Traits::kCluster>::sync();

  const int warpgroup = cutlass::canonical_warp_group_idx();
  if (Traits::kConverterWarps > 0 && warpgroup > Traits::kConsumerWarpgroups) {
    if constexpr (Traits::kConverterWarps > 0) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kConverterRegisters>();
      Converter<Traits>(smem).run();
    }
  } else if (warpgroup == 0) {
    if constexpr (Traits::kMoveRegisters) cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    produce<Traits>(params, smem, cutlass::canonical_warp_idx_sync(), listed);
  } else {
    if constexpr (Traits::kMoveRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    } else {
      Cluster<Traits::kCluster>::sync();
    }
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

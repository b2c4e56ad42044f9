// Tile shapes, the matrix instructions that follow from them, and the plan of shared memory.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

#include "sm90/scheduler.cuh"

namespace lite_attention::sm90 {

using namespace cute;

// The shapes to tune. Prefill tiles are bound by the tensor cores and exp2, decode tiles by the bytes of K and V.
template <int kHeadDim, bool kDecode>
struct TileShape {};
template <>
struct TileShape<64, false> {
  static constexpr int kBlockM = 192, kBlockN = 128, kStages = 4;
};
template <>
struct TileShape<128, false> {
  static constexpr int kBlockM = 128, kBlockN = 128, kStages = 3;
};
template <>
struct TileShape<64, true> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 5;
};
template <>
struct TileShape<128, true> {
  static constexpr int kBlockM = 64, kBlockN = 128, kStages = 3;
};

template <class Element_, int kHeadDim_, bool kDecode>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;

  using Shape = TileShape<kHeadDim, kDecode>;
  static constexpr int kBlockM = Shape::kBlockM;
  static constexpr int kBlockN = Shape::kBlockN;
  static constexpr int kStages = Shape::kStages;

  static constexpr int kConsumerWarpgroups = kBlockM / 64;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kThreads = 128 + kConsumerThreads;

  // Producer warps for each of K and V.
  static constexpr int kLoadWarps = 2;
  static constexpr int kProducerWarps = 2 * kLoadWarps;

  // Items that the scheduling warp may be ahead of the others.
  static constexpr int kWorkStages = 2;

  // Registers a thread, by role. One consumer warpgroup beside the producer can have the maximum without moving any.
  static constexpr bool kMoveRegisters = kConsumerWarpgroups > 1;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 2 ? 232 : 160;

  // Tiles lie in shared memory as [head_dim / 64][rows][64 columns], each row of 128 bytes under the 128-byte swizzle:
  // what a TMA box of 64 columns writes, and what wgmma reads as K-major Q and K and as MN-major V.
  static constexpr int kSlabColumns = 64;
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kRowBytes = kSlabColumns * sizeof(Element);
  static_assert(kRowBytes == 128, "one row of a slab is one span of the 128-byte swizzle");
  static_assert(kHeadDim % kSlabColumns == 0, "head dims between slabs need predicated columns");
  static_assert(kBlockN % 16 == 0, "pages are multiples of 16 tokens and must not straddle a tile's end");

  static constexpr int kTileBytesKV = kBlockN * kHeadDim * sizeof(Element);

  using LayoutAtom = GMMA::Layout_K_SW128_Atom<Element>;
  using LayoutAtomV = GMMA::Layout_MN_SW128_Atom<Element>;
  using SmemLayoutQ = decltype(tile_to_shape(LayoutAtom{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using SmemLayoutK = decltype(tile_to_shape(LayoutAtom{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  // V as (head_dim, keys): the same bytes as SmemLayoutK, walked keys first.
  using SmemLayoutVt = decltype(tile_to_shape(LayoutAtomV{}, cute::Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>{},
                                              Step<_2, _1, _3>{}));

  using WarpgroupLayout = Layout<cute::Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      WarpgroupLayout{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      WarpgroupLayout{}));

  using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
  using EmptyBarrier = cutlass::arch::ClusterBarrier;

  struct SharedStorage {
    alignas(1024) Element q[kBlockM * kHeadDim];
    alignas(1024) Element k[kStages * kBlockN * kHeadDim];
    alignas(1024) Element v[kStages * kBlockN * kHeadDim];
    FullBarrier q_full;
    EmptyBarrier q_empty;
    FullBarrier k_full[kStages];
    EmptyBarrier k_empty[kStages];
    FullBarrier v_full[kStages];
    EmptyBarrier v_empty[kStages];
    FullBarrier work_full[kWorkStages];
    EmptyBarrier work_empty[kWorkStages];
    Work work[kWorkStages];
    bool last_arrival;
  };
  // Dynamic shared memory is only 16-byte aligned by contract; the swizzle wants 1024.
  static constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;
  static_assert(kSmemBytes <= 227 * 1024, "a block has 227 KB on sm_90");
};

// Named barriers of the consumers. Zero is __syncthreads; cutlass keeps 1 to 7 for itself and adds that offset.
enum Barrier : uint32_t { kConsumers = 0, kTurn = 1, kWarpgroup = 4 };

}  // namespace lite_attention::sm90

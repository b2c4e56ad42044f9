// Tile shapes, the matrix instructions that follow from them, and the plan of shared memory.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_conversion.h>

#include <cute/tensor.hpp>

#include "sm90/cluster.cuh"
#include "sm90/launch.h"
#include "sm90/list_storage.cuh"
#include "sm90/scheduler.cuh"

namespace lite_attention::sm90 {

using namespace cute;

// The shapes to tune: rows, keys and ring stages, as many as fit in shared memory. Prefill tiles are bound by the
// tensor cores and exp2, decode tiles by the bytes of K and V. At head_dim 128 these are as fast with two stages as
// with three, at 64 with three as with five, and a step over lists of pages is faster, whose kernels follow each other
// closely. kPaged and kDecode of a head dim have one kBlockN: with it a row's result does not depend on which of the
// two computes it. Clusters are for kFull, where blocks walk the same keys at one time: under a mask half the rows of a
// cluster would wait at its diagonal, and where some sequences decode, one of its blocks would only look on.
template <int kBlockM_, int kBlockN_, int kStages_, int kCluster_ = 1>
struct Shape {
  using Type = Shape;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kKeyStages = kStages;  // of K, where it has more than V
};

template <int kHeadDim, TileKind kKind>
struct TileShape : TileShape<kHeadDim, TileKind::kPrefill> {};
template <>
struct TileShape<64, TileKind::kPrefill> : Shape<192, 128, 4> {};
template <>
struct TileShape<64, TileKind::kDecode> : Shape<64, 128, 3> {};
template <>
struct TileShape<96, TileKind::kPrefill> : Shape<128, 128, 3> {};
template <>
struct TileShape<96, TileKind::kDecode> : Shape<64, 128, 4> {};
template <>
struct TileShape<128, TileKind::kPrefill> : Shape<128, 160, 2> {};
template <>
struct TileShape<128, TileKind::kFull> : Shape<128, 176, 2, 2> {};
template <>
struct TileShape<128, TileKind::kPaged> : Shape<128, 128, 3> {};
template <>
struct TileShape<128, TileKind::kDecode> : Shape<64, 128, 2> {};
template <>
struct TileShape<128, TileKind::kSkip> : Shape<128, 176, 2> {};
template <>
struct TileShape<192, TileKind::kPrefill> : Shape<128, 112, 2> {};
template <>
struct TileShape<192, TileKind::kDecode> : Shape<64, 112, 2> {};
template <>
struct TileShape<256, TileKind::kPrefill> : Shape<128, 80, 2> {};
template <>
struct TileShape<256, TileKind::kDecode> : Shape<64, 80, 2> {};
template <>
struct TileShape<256, TileKind::kSkip> : Shape<128, 64, 2> {};

// A ring of tiles in shared memory.
template <class Element, class FullBarrier, class EmptyBarrier>
struct TileRing {
  FullBarrier* full;
  EmptyBarrier* empty;
  Element* tiles;
};

template <class Element_, int kHeadDim_, class TileShape, bool kScoreMod_, bool kSkip_ = false, class Query_ = Element_>
struct Traits {
  using Element = Element_;  // of the output, and of Q, K and V unless said otherwise
  using Query = Query_;      // of Q and K in shared memory
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kScoreMod = kScoreMod_;
  static constexpr bool kSkip = kSkip_;

  static constexpr int kBlockM = TileShape::kBlockM;
  static constexpr int kBlockN = TileShape::kBlockN;
  static constexpr int kStages = TileShape::kStages;
  static constexpr int kKeyStages = TileShape::kKeyStages;

  // Blocks with different queries that share each K and V tile, so that it leaves L2 once for all of them.
  static constexpr int kCluster = TileShape::kCluster;

  // Serves lists of pages beside dense calls.
  static constexpr bool kPageLists = kBlockM == kRowsPerWarpgroup && !kScoreMod;

  static constexpr int kConsumerWarpgroups = kBlockM / kRowsPerWarpgroup;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kThreads = 128 + kConsumerThreads;

  // Of V in the stages, and of the probabilities, which are stored under a factor of 2^kProbabilityShift.
  using Value = Element;
  static constexpr int kProbabilityShift = 0;

  static constexpr int kProducerWarps = 4;

  // Warps between the producers and the consumers, where V or K and V do not arrive as the consumers read them
  // (fp8_kv.cuh).
  static constexpr int kConverterWarps = 0;
  static constexpr bool kConvertsKeys = false;

  // Items in the work ring: one whose output consumers have not stored yet, one that they finish, one that they are at,
  // one ahead.
  static constexpr int kWorkStages = 4;

  // Registers a thread, by role. One consumer warpgroup beside the producer can have the maximum without moving any.
  static constexpr bool kMoveRegisters = kConsumerWarpgroups > 1;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 2 ? 232 : 160;

  // Tiles lie in shared memory as [slabs][rows][kSlabColumns], each row one span of the swizzle: what a TMA box writes,
  // and what wgmma reads as K-major Q and K and as MN-major V.
  static constexpr int kSlabColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kSlabs = kHeadDim / kSlabColumns;
  static constexpr int kRowBytes = kSlabColumns * sizeof(Element);
  static constexpr int kQueryRowBytes = kSlabColumns * sizeof(Query);
  static_assert(kHeadDim % kSlabColumns == 0, "a tile is whole slabs");
  static_assert(kBlockN % 16 == 0, "pages are multiples of 16 tokens and must not straddle a tile's end");

  // Rows of a box of keys that are not paged: every block of a cluster has boxes of its own to load.
  static constexpr int kBoxRows = kBlockN / kCluster;
  static_assert(kBoxRows % 8 == 0, "a box is whole swizzle atoms");

  using LayoutAtom = conditional_t<
      kQueryRowBytes == 128, GMMA::Layout_K_SW128_Atom<Query>,
      conditional_t<kQueryRowBytes == 64, GMMA::Layout_K_SW64_Atom<Query>, GMMA::Layout_K_SW32_Atom<Query>>>;
  using LayoutAtomV =
      conditional_t<kSlabColumns == 64, GMMA::Layout_MN_SW128_Atom<Element>, GMMA::Layout_MN_SW64_Atom<Element>>;
  using SmemLayoutQ = decltype(tile_to_shape(LayoutAtom{}, cute::Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using SmemLayoutK =
      decltype(tile_to_shape(LayoutAtom{}, cute::Shape<Int<kBlockN>, Int<kHeadDim>, Int<kKeyStages>>{}));
  // V as (head_dim, keys): stored as K is, walked keys first.
  using SmemLayoutVt = decltype(tile_to_shape(LayoutAtomV{}, cute::Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>{},
                                              Step<_2, _1, _3>{}));

  using WarpgroupLayout = Layout<cute::Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Query, Query, float, cute::Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      WarpgroupLayout{}));
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, cute::Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      WarpgroupLayout{}));

  // Without CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED (setup.py) CuTe knows few widths, and takes one of 16 or 32 columns
  // for all others.
  static_assert(size<1>(typename MmaQK::AtomShape_MNK{}) == kBlockN &&
                    size<1>(typename MmaPV::AtomShape_MNK{}) == kHeadDim,
                "one instruction is as wide as the tile");

  using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
  using EmptyBarrier = cutlass::arch::ClusterBarrier;

  struct SharedStorage {
    alignas(1024) Query q[kBlockM * kHeadDim];
    alignas(1024) Query k[kKeyStages * kBlockN * kHeadDim];
    alignas(1024) Element v[kStages * kBlockN * kHeadDim];
    FullBarrier q_full[kConsumerWarpgroups];
    EmptyBarrier q_empty[kConsumerWarpgroups];
    FullBarrier k_full[kKeyStages];
    EmptyBarrier k_empty[kKeyStages];
    FullBarrier v_full[kStages];
    EmptyBarrier v_empty[kStages];
    EmptyBarrier work_full[kWorkStages];
    EmptyBarrier work_empty[kWorkStages];
    EmptyBarrier work_wanted;  // the block will soon need another item
    Work work[kWorkStages];
    bool last_arrival;
    float2 finished[kBlockM];  // rows whose item is over: what normalises them, and their log-sum-exp
    ListStorage<kSkip, kBlockN> lists;
  };
  // Dynamic shared memory is only 16-byte aligned by contract; the swizzle wants 1024.
  static constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;
  static_assert(kSmemBytes <= 227 * 1024, "a block has 227 KB on sm_90");

  // What TMA fills: here the stages themselves.
  using Loaded = Element;
  static constexpr int kLoadStages = kStages;
  static constexpr int kLoadedRowBytes = kRowBytes;
  using Loads = TileRing<Loaded, FullBarrier, EmptyBarrier>;
  __device__ static Loads k_loads(SharedStorage& smem) { return {smem.k_full, smem.k_empty, smem.k}; }
  __device__ static Loads v_loads(SharedStorage& smem) { return {smem.v_full, smem.v_empty, smem.v}; }
};

// Named barriers of the consumers. Zero is __syncthreads; cutlass keeps 1 to 7 for itself and adds that offset.
enum Barrier : uint32_t { kConsumers = 0, kTurn = 1, kWarpgroup = 4 };

// The place of this block's first warpgroup among those of its cluster.
template <class Traits>
__device__ int first_warpgroup() {
  return Cluster<Traits::kCluster>::rank() * Traits::kConsumerWarpgroups;
}

}  // namespace lite_attention::sm90

// The producer warps: they keep the rings of K and V tiles full by TMA, and Q one work item ahead.
//
// Two warps load K and two load V. A warp issues the boxes of its lanes one by one, 40 to 50 cycles each, so small
// pages need several.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/sequence.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

// Fills a box in shared memory, at the same place in all kBlocks blocks of the cluster.
template <int kBlocks, class Barrier>
__device__ void tma_load(const CUtensorMap& map, Barrier& full, void* smem, int c0, int c1, int c2, int c3) {
  auto* barrier = reinterpret_cast<uint64_t*>(&full);
  constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
  if constexpr (kBlocks == 1) {
    SM90_TMA_LOAD_4D::copy(&map, barrier, kHint, smem, c0, c1, c2, c3);
  } else {
    SM90_TMA_LOAD_MULTICAST_4D::copy(&map, barrier, uint16_t((1 << kBlocks) - 1), kHint, smem, c0, c1, c2, c3);
  }
}

// Where one lane's box of a tile comes from: an index of the outermost dimension, which is a page or the batch, and the
// first row in it. Looked up a tile ahead, off the path between a free stage and its refill, because a page's number
// comes from device memory and its row from a division.
struct Box {
  int outer = 0, row = 0;
};

// Where the K or V tile n of one sequence and head comes from, and how it is fetched into a stage. All lanes of the
// warp call together. A contiguous tile has one box a slab, a paged one has one for every slab of every page.
template <class Traits>
class TileLoader {
  using FullBarrier = typename Traits::FullBarrier;
  using Loaded = typename Traits::Loaded;

 public:
  // `part` is which of the block's warps that share a tile this one is.
  __device__ TileLoader(const FwdParams& params, const CUtensorMap& map, const Work& work, int kv_head, int part)
      : params_(params), map_(map), seqlen_k_(work.seq.seqlen_k), kv_head_(kv_head) {
    const int rank = Cluster<Traits::kCluster>::rank();
    const int first_box = (threadIdx.x % 32 * Traits::kLoadWarps + part) * Traits::kCluster;
    slab_ = (first_box + rank) % Traits::kSlabs;
    tile_row_ = (first_box + rank) / Traits::kSlabs * params.box_rows;
#pragma unroll
    for (int block = 0; block < Traits::kCluster; ++block) {
      rows_of_[block] = (first_box + block) / Traits::kSlabs * params.box_rows;
    }
    if (params.block_table) {
      table_ = params.block_table + work.batch * params.block_table_stride;
    } else {
      token0_ = work.seq.k_begin;
      batch_ = params.k_has_batch ? work.batch : 0;
    }
  }

  __device__ Box find(int n_tile) const {
    if (!has_box(n_tile, tile_row_)) return {};
    int token = n_tile * Traits::kBlockN + tile_row_;
    if (!table_) return {batch_, token0_ + token};
    int page = token / params_.page_size;
    return {table_[page], token - page * params_.page_size};
  }

  // The barrier's phase completes when the bytes have landed, from all blocks of the cluster. Rows past a tensor's end
  // arrive as zeros.
  __device__ void load(FullBarrier& full, Loaded* smem, int n_tile, Box box) const {
    int boxes = 0;
#pragma unroll
    for (int row : rows_of_) boxes += __popc(__ballot_sync(~0u, has_box(n_tile, row)));
    if (threadIdx.x % 32 == 0) full.arrive_and_expect_tx(boxes * params_.box_rows * Traits::kLoadedRowBytes);
    __syncwarp();
    if (has_box(n_tile, tile_row_)) {
      auto* to = smem + (slab_ * Traits::kBlockN + tile_row_) * Traits::kSlabColumns;
      tma_load<Traits::kCluster>(map_, full, to, slab_ * Traits::kSlabColumns, box.row, kv_head_, box.outer);
    }
  }

 private:
  static_assert(Traits::kBlockN / 16 * Traits::kSlabs <= 32 * Traits::kLoadWarps * Traits::kCluster,
                "a lane has one box of a tile");

  // Pages past the last key are not loaded and their numbers not read; what the stage holds there instead is masked.
  __device__ bool has_box(int n_tile, int tile_row) const {
    return tile_row < min(Traits::kBlockN, seqlen_k_ - n_tile * Traits::kBlockN);
  }

  const FwdParams& params_;
  const CUtensorMap& map_;
  const int* table_ = nullptr;  // of this sequence's pages
  int seqlen_k_, kv_head_;
  int token0_ = 0, batch_ = 0;     // where keys without pages begin
  int slab_, tile_row_;            // this lane's box in every tile
  int rows_of_[Traits::kCluster];  // the first rows of the boxes of this lane in each block of the cluster
};

// The queries of one item, warpgroup by warpgroup: one is refilled while another still reads its own.
template <class Traits>
class QueryLoader {
 public:
  __device__ void load(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work) {
    const Packing& packing = params.packing;
    const int bytes = packing.tokens_per_warpgroup * packing.pack * Traits::kRowBytes * Traits::kSlabs;
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      Rows rows(packing, work.seq, work.m_tile, first_warpgroup<Traits>() + warpgroup);
      if (rows.used <= 0) continue;
      smem.q_empty[warpgroup].wait((phases_ >> warpgroup & 1) ^ 1);
      phases_ ^= 1u << warpgroup;
      if (threadIdx.x % 32 != 0) continue;
      auto& full = smem.q_full[warpgroup];
      full.arrive_and_expect_tx(bytes);
      for (int slab = 0; slab < Traits::kSlabs; ++slab) {
        auto* to = smem.q + (slab * Traits::kBlockM + warpgroup * kRowsPerWarpgroup) * Traits::kSlabColumns;
        tma_load<1>(params.map_q, full, to, slab * Traits::kSlabColumns, work.head_tile * packing.pack,
                    work.seq.q_begin + rows.first_token, params.lengths.cu_seqlens_q ? 0 : work.batch);
      }
    }
  }

 private:
  uint32_t phases_ = 0;  // one bit a warpgroup
};

// The work of one ring, from the last tile to the first, so that masked tiles come first.
template <class Traits>
__device__ void produce_tiles(const TileLoader<Traits>& loader, const Work& work, const typename Traits::Loads& loads,
                              Ring<Traits::kLoadStages>& ring) {
  Box box = loader.find(work.n_end - 1);
  for (int n = work.n_end - 1; n >= work.n_begin; --n) {
    Box next = n > work.n_begin ? loader.find(n - 1) : Box{};
    loads.empty[ring.stage].wait(ring.phase ^ 1);
    loader.load(loads.full[ring.stage], loads.tiles + ring.stage * Traits::kBlockN * Traits::kHeadDim, n, box);
    ring.advance();
    box = next;
  }
}

// Warp 0 of a cluster's first block asks for the work and tells all others, producers and consumers, through the work
// ring. The last warp also loads the queries: where tiles are contiguous it has nothing else to do, and V is not needed
// as soon as K.
template <class Traits>
__device__ void produce(const FwdParams& params, typename Traits::SharedStorage& smem, int warp) {
  using Blocks = Cluster<Traits::kCluster>;
  const bool scheduling = warp == 0 && Blocks::rank() == 0, loads_v = warp % 2,
             loads_q = warp == Traits::kProducerWarps - 1;
  const int part = warp / 2;
  Ring<Traits::kLoadStages> ring;
  WorkRing<Traits> ring_work(smem);
  QueryLoader<Traits> queries;
  Scheduler<true> scheduler(params, Blocks::worker());
  while (true) {
    Work work;
    if (scheduling) {
      work = scheduler.next();
      ring_work.put(work);
    } else {
      work = ring_work.get();
    }
    if (work.parts == 0) break;
    if (work.n_begin >= work.n_end) continue;

    if (loads_q) queries.load(params, smem, work);
    int kv_head = work.head_tile * params.packing.pack / params.packing.heads_per_kv;
    TileLoader<Traits> loader(params, loads_v ? params.map_v : params.map_k, work, kv_head, part);
    loads_v ? produce_tiles<Traits>(loader, work, Traits::v_loads(smem), ring)
            : produce_tiles<Traits>(loader, work, Traits::k_loads(smem), ring);
  }
}

}  // namespace lite_attention::sm90

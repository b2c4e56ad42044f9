// The producer warps: they keep the rings of K and V tiles full by TMA, and Q one work item ahead.
//
// Two warps load K and two load V. A warp issues the boxes of its lanes one by one, 40 to 50 cycles each, so small
// pages need several.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/sequence.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

__device__ inline void tma_load(const CUtensorMap& map, uint64_t* barrier, void* smem, int c0, int c1, int c2, int c3,
                                int c4) {
  SM90_TMA_LOAD_5D::copy(&map, barrier, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL), smem, c0, c1, c2, c3,
                         c4);
}

// One lane's share of a paged tile: a box of page_rows tokens and 64 columns. Looked up a tile ahead, off the path
// between a free stage and its refill, because the page's number comes from device memory and its row from a division.
struct Box {
  int page = 0, row = 0;
};

// Where the K or V tile n of one sequence and head comes from, and how it is fetched into a stage. All lanes of the
// warp call together.
template <class Traits>
class TileLoader {
  using FullBarrier = typename Traits::FullBarrier;
  using Element = typename Traits::Element;

 public:
  // `part` is which of the warps that share a tile this one is.
  __device__ TileLoader(const FwdParams& params, const CUtensorMap& map, const Sequence& seq, int batch, int kv_head,
                        int part)
      : params_(params), map_(map), seqlen_k_(seq.seqlen_k), kv_head_(kv_head), part_(part) {
    if (params.block_table) {
      table_ = params.block_table + batch * params.block_table_stride;
      int box = lane() * Traits::kLoadWarps + part;
      slab_ = box % Traits::kSlabs;
      tile_row_ = box / Traits::kSlabs * params.page_rows;
    } else {
      token0_ = seq.k_begin;
      batch_ = params.k_has_batch ? batch : 0;
    }
  }

  __device__ Box find(int n_tile) const {
    if (!table_ || !has_box(n_tile)) return {};
    int token = n_tile * Traits::kBlockN + tile_row_, page = token / params_.page_size;
    return {table_[page], token - page * params_.page_size};
  }

  // The barrier's phase completes when the bytes have landed.
  __device__ void load(FullBarrier& full, Element* smem, int n_tile, Box box) const {
    table_ ? load_pages(full, smem, n_tile, box) : load_contiguous(full, smem, n_tile);
  }

 private:
  static_assert(Traits::kBlockN / 16 * Traits::kSlabs <= 32 * Traits::kLoadWarps, "a lane has one box of a tile");

  __device__ static int lane() { return threadIdx.x % 32; }

  // Pages past the last key are not loaded and their numbers not read; what the stage holds there instead is masked.
  __device__ bool has_box(int n_tile) const {
    return tile_row_ < min(Traits::kBlockN, seqlen_k_ - n_tile * Traits::kBlockN);
  }

  // One box for the whole tile; rows past the tensor's end arrive as zeros.
  __device__ void load_contiguous(FullBarrier& full, Element* smem, int n_tile) const {
    if (lane() != 0) return;
    if (part_ == 0) {
      full.arrive_and_expect_tx(Traits::kTileBytesKV);
      tma_load(map_, barrier_of(full), smem, 0, token0_ + n_tile * Traits::kBlockN, 0, kv_head_, batch_);
    } else {
      full.arrive();
    }
  }

  __device__ void load_pages(FullBarrier& full, Element* smem, int n_tile, Box box) const {
    const bool mine = has_box(n_tile);
    const int boxes = __popc(__ballot_sync(~0u, mine));
    if (lane() == 0) full.arrive_and_expect_tx(boxes * params_.page_rows * Traits::kRowBytes);
    __syncwarp();
    if (mine) {
      auto* to = smem + (slab_ * Traits::kBlockN + tile_row_) * Traits::kSlabColumns;
      tma_load(map_, barrier_of(full), to, 0, box.row, slab_, kv_head_, box.page);
    }
  }

  __device__ static uint64_t* barrier_of(typename Traits::FullBarrier& full) {
    return reinterpret_cast<uint64_t*>(&full);
  }

  const FwdParams& params_;
  const CUtensorMap& map_;
  const int* table_ = nullptr;
  int seqlen_k_, kv_head_, part_;
  int token0_ = 0, batch_ = 0;   // contiguous keys
  int slab_ = 0, tile_row_ = 0;  // paged keys: this lane's box in every tile
};

template <class Traits>
__device__ void load_q(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work,
                       const Sequence& seq) {
  const Packing& packing = params.packing;
  int bytes = packing.tokens_per_tile * packing.pack * Traits::kRowBytes * Traits::kSlabs;
  smem.q_full.arrive_and_expect_tx(bytes);
  int batch = params.lengths.cu_seqlens_q ? 0 : work.batch;
  for (int slab = 0; slab < Traits::kSlabs; ++slab) {
    tma_load(params.map_q, reinterpret_cast<uint64_t*>(&smem.q_full),
             smem.q + slab * Traits::kBlockM * Traits::kSlabColumns, 0, work.head_tile * packing.pack,
             seq.q_begin + work.m_tile * packing.tokens_per_tile, slab, batch);
  }
}

// The work of one ring, from the last tile to the first, so that masked tiles come first.
template <class Traits>
__device__ void produce_tiles(const TileLoader<Traits>& loader, const Work& work, typename Traits::FullBarrier* full,
                              typename Traits::EmptyBarrier* empty, typename Traits::Element* tiles,
                              Ring<Traits::kStages>& ring) {
  Box box = loader.find(work.n_end - 1);
  for (int n = work.n_end - 1; n >= work.n_begin; --n) {
    Box next = n > work.n_begin ? loader.find(n - 1) : Box{};
    empty[ring.stage].wait(ring.phase ^ 1);
    loader.load(full[ring.stage], tiles + ring.stage * Traits::kBlockN * Traits::kHeadDim, n, box);
    ring.advance();
    box = next;
  }
}

// Warp 0 asks for the work and tells all others, producers and consumers, through the work ring.
template <class Traits>
__device__ void produce(const FwdParams& params, typename Traits::SharedStorage& smem, int warp) {
  const bool scheduling = warp == 0, leader = threadIdx.x % 32 == 0, loads_v = warp % 2;
  const int part = warp / 2;
  Ring<Traits::kStages> ring;
  WorkRing<Traits> ring_work(smem);
  uint32_t q_phase = 0;
  Scheduler scheduler(params);
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

    Sequence seq(params.lengths, work.batch);
    if (loads_v &&
        part == 0) {  // K does not wait for the last item's queries to be done with, and V is not needed as soon
      smem.q_empty.wait(q_phase ^ 1);
      if (leader) load_q<Traits>(params, smem, work, seq);
      q_phase ^= 1;
    }
    int kv_head = work.head_tile * params.packing.pack / params.packing.heads_per_kv;
    TileLoader<Traits> loader(params, loads_v ? params.map_v : params.map_k, seq, work.batch, kv_head, part);
    loads_v ? produce_tiles<Traits>(loader, work, smem.v_full, smem.v_empty, smem.v, ring)
            : produce_tiles<Traits>(loader, work, smem.k_full, smem.k_empty, smem.k, ring);
  }
}

}  // namespace lite_attention::sm90

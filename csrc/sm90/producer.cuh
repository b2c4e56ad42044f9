// The producer warp: keeps the rings of K and V tiles full by TMA, and Q one work item ahead.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/sequence.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

__device__ inline void tma_load(const CUtensorMap& map, uint64_t* barrier, void* smem, int c0, int c1, int c2, int c3, int c4) {
  SM90_TMA_LOAD_5D::copy(&map, barrier, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL), smem, c0, c1, c2, c3, c4);
}

// Where the K or V tile n of one sequence and head comes from, and how it is fetched into a stage.
template <class Traits>
class TileLoader {
 public:
  __device__ TileLoader(const FwdParams& params, const Sequence& seq, int batch, int kv_head)
      : params_(params), seqlen_k_(seq.seqlen_k), kv_head_(kv_head) {
    if (params.block_table) {
      table_ = params.block_table + batch * params.block_table_stride;
    } else {
      token0_ = seq.k_begin;
      batch_ = params.k_has_batch ? batch : 0;
    }
  }

  // The page of this lane's box in a tile. Asked for a tile ahead, because the answer comes from device memory.
  __device__ int page(int n_tile) const {
    if (!table_ || lane() >= boxes(n_tile)) return 0;
    return table_[(n_tile * Traits::kBlockN + lane() / Traits::kSlabs * params_.page_rows) / params_.page_size];
  }

  // All lanes of the warp. The barrier's phase completes when the bytes have landed.
  __device__ void load(const CUtensorMap& map, typename Traits::FullBarrier& full, typename Traits::Element* smem, int n_tile, int page) const {
    table_ ? load_pages(map, full, smem, n_tile, page) : load_contiguous(map, full, smem, n_tile);
  }

 private:
  __device__ static int lane() { return threadIdx.x % 32; }

  // One box for each (run of page_rows tokens, slab of 64 columns). Pages past the last key are not loaded and their numbers not
  // read; what the stage holds there instead is masked.
  __device__ int boxes(int n_tile) const {
    int valid = min(Traits::kBlockN, seqlen_k_ - n_tile * Traits::kBlockN);
    return (valid + params_.page_rows - 1) / params_.page_rows * Traits::kSlabs;
  }
  static_assert(Traits::kBlockN / 16 * Traits::kSlabs <= 32, "a lane issues one box of a tile");

  // One box for the whole tile; rows past the tensor's end arrive as zeros.
  __device__ void load_contiguous(const CUtensorMap& map, typename Traits::FullBarrier& full, typename Traits::Element* smem, int n_tile) const {
    if (lane() == 0) {
      full.arrive_and_expect_tx(Traits::kTileBytesKV);
      tma_load(map, barrier_of(full), smem, 0, token0_ + n_tile * Traits::kBlockN, 0, kv_head_, batch_);
    }
  }

  __device__ void load_pages(const CUtensorMap& map, typename Traits::FullBarrier& full, typename Traits::Element* smem, int n_tile, int page) const {
    int rows = params_.page_rows, count = boxes(n_tile);
    if (lane() == 0) full.arrive_and_expect_tx(count * rows * Traits::kRowBytes);
    __syncwarp();
    if (lane() < count) {
      int slab = lane() % Traits::kSlabs, row = lane() / Traits::kSlabs * rows;
      auto* to = smem + (slab * Traits::kBlockN + row) * Traits::kSlabColumns;
      tma_load(map, barrier_of(full), to, 0, (n_tile * Traits::kBlockN + row) % params_.page_size, slab, kv_head_, page);
    }
  }

  __device__ static uint64_t* barrier_of(typename Traits::FullBarrier& full) {
    return reinterpret_cast<uint64_t*>(&full);
  }

  const FwdParams& params_;
  const int* table_ = nullptr;
  int seqlen_k_, kv_head_;
  int token0_ = 0, batch_ = 0;
};

template <class Traits>
__device__ void load_q(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work, const Sequence& seq) {
  const Packing& packing = params.packing;
  int bytes = packing.tokens_per_tile * packing.pack * Traits::kRowBytes * Traits::kSlabs;
  smem.q_full.arrive_and_expect_tx(bytes);
  int batch = params.lengths.cu_seqlens_q ? 0 : work.batch;
  for (int slab = 0; slab < Traits::kSlabs; ++slab) {
    tma_load(params.map_q, reinterpret_cast<uint64_t*>(&smem.q_full), smem.q + slab * Traits::kBlockM * Traits::kSlabColumns, 0,
             work.head_tile * packing.pack, seq.q_begin + work.m_tile * packing.tokens_per_tile, slab, batch);
  }
}

// K and V tiles go out from the last to the first, so that masked tiles come first: K(n-1), then V(n), K(n-2), ...
template <class Traits>
__device__ void produce(const FwdParams& params, typename Traits::SharedStorage& smem) {
  constexpr int kTileElements = Traits::kBlockN * Traits::kHeadDim;
  const bool leader = threadIdx.x % 32 == 0;
  Ring<Traits::kStages> ring_k, ring_v;
  Ring<Traits::kWorkStages> ring_work;
  uint32_t q_phase = 0;
  Scheduler scheduler(params);
  while (true) {
    const Work work = scheduler.next();
    smem.work_empty[ring_work.stage].wait(ring_work.phase ^ 1);
    if (leader) {
      smem.work[ring_work.stage] = work;
      smem.work_full[ring_work.stage].arrive();
    }
    ring_work.advance();
    if (work.parts == 0) break;
    if (work.n_begin >= work.n_end) continue;

    Sequence seq(params.lengths, work.batch);
    int kv_head = work.head_tile * params.packing.pack / params.packing.heads_per_kv;
    TileLoader<Traits> loader(params, seq, work.batch, kv_head);
    auto load_k = [&](int n, int page) {
      smem.k_empty[ring_k.stage].wait(ring_k.phase ^ 1);
      loader.load(params.map_k, smem.k_full[ring_k.stage], smem.k + ring_k.stage * kTileElements, n, page);
      ring_k.advance();
    };
    auto load_v = [&](int n, int page) {
      smem.v_empty[ring_v.stage].wait(ring_v.phase ^ 1);
      loader.load(params.map_v, smem.v_full[ring_v.stage], smem.v + ring_v.stage * kTileElements, n, page);
      ring_v.advance();
    };

    int n = work.n_end - 1, page = loader.page(n);
    int next_page = n > work.n_begin ? loader.page(n - 1) : 0;
    load_k(n, page);  // the first K does not wait for the last item's queries to be free
    smem.q_empty.wait(q_phase ^ 1);
    if (leader) load_q<Traits>(params, smem, work, seq);
    q_phase ^= 1;
    for (--n; n >= work.n_begin; --n) {
      int page_after = n > work.n_begin ? loader.page(n - 1) : 0;
      load_k(n, next_page);
      load_v(n + 1, page);
      page = next_page;
      next_page = page_after;
    }
    load_v(work.n_begin, page);
  }
}

}  // namespace lite_attention::sm90

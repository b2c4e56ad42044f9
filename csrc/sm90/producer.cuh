// The producer warps: they keep the rings of K and V tiles full by TMA, and Q one work item ahead.
//
// A warp issues the boxes of its lanes one by one, 40 to 50 cycles each, so small pages need two warps for each of K
// and V. Otherwise there is one for each job, planning, K, V and Q, and none waits for another's: the next item's first
// tiles arrive while the consumers end the item before.
#pragma once

#include "sm90/page_scheduler.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/sequence.cuh"
#include "sm90/skip_list.cuh"
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

// Warps that load each of K and V.
template <class Traits>
__device__ int load_warps(const FwdParams& params) {
  return !Traits::kSkip && params.block_table ? 2 : 1;  // what lists ask of the planning warp leaves it no time for K
}

// Where one lane's box of a tile comes from: an index of the outermost dimension, which is a page or the batch, and the
// first row in it. Looked up ahead, off the path between a free stage and its refill, because a page's number comes
// from device memory and its row from a division.
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
  // `part` is which of the block's warps that share a tile this one is; `listed` whether tiles are of listed pages.
  __device__ TileLoader(const FwdParams& params, const CUtensorMap& map, const Work& work, int kv_head, int part,
                        bool listed)
      : params_(params), map_(map), seqlen_k_(work.seq.seqlen_k), kv_head_(kv_head) {
    const int rank = Cluster<Traits::kCluster>::rank();
    const int first_box = (threadIdx.x % 32 * load_warps<Traits>(params) + part) * Traits::kCluster;
    slab_ = (first_box + rank) % Traits::kSlabs;
    box_ = (first_box + rank) / Traits::kSlabs;
#pragma unroll
    for (int block = 0; block < Traits::kCluster; ++block) {
      boxes_of_[block] = (first_box + block) / Traits::kSlabs;
    }
    if (params.block_table) {
      table_ = params.block_table + work.batch * params.block_table_stride;
      if constexpr (Traits::kPageLists) {
        const PageLists& lists = params.lengths.lists.indices ? params.lengths.lists : params.step_lists;
        if (listed) list_ = lists.indices + (int64_t{work.batch} * lists.heads + kv_head) * lists.max_pages;
      }
    } else {
      token0_ = work.seq.k_begin;
      batch_ = params.k_has_batch ? work.batch : 0;
    }
  }

  __device__ Box find(int n_tile) const { return numbered(listed(place(n_tile, box_))); }

  // The same for any of the boxes above each other in a tile, in three steps, the last two of which load. First the
  // page as the list counts them; negative where the tile has no such box.
  __device__ Box place(int n_tile, int box) const {
    if (!has_box(n_tile, box)) return {-1, 0};
    if (!table_) return {batch_, token0_ + n_tile * Traits::kBlockN + box * params_.box_rows};
    const int place = n_tile * params_.boxes_of_tile + box;
    if (params_.boxes_of_page == 1) return {place, 0};  // what a division takes is felt at the beginning of an item
    const int page = place / params_.boxes_of_page;
    return {page, (place - page * params_.boxes_of_page) * params_.box_rows};
  }
  // Then as the sequence does.
  __device__ Box listed(Box box) const {
    if constexpr (Traits::kPageLists) {
      if (list_ && box.outer >= 0) box.outer = __ldcg(list_ + box.outer);
    }
    return box;
  }
  // Then as the cache does. What a list says must not lead past the table; a page that the cache hasn't arrives as
  // zeros.
  __device__ Box numbered(Box box) const {
    if (!table_) return box;
    const bool there = unsigned(box.outer) < unsigned(params_.table_pages);
    box.outer = there ? table_[box.outer] : -1;
    return box;
  }

  // Which of them this lane loads.
  __device__ int box() const { return box_; }

  // The barrier's phase completes when the bytes have landed, from all blocks of the cluster. Rows past a tensor's end
  // arrive as zeros.
  __device__ void load(FullBarrier& full, Loaded* smem, int n_tile, Box box) const {
    int boxes = 0;
#pragma unroll
    for (int box : boxes_of_) boxes += __popc(__ballot_sync(~0u, has_box(n_tile, box)));
    if (threadIdx.x % 32 == 0) full.arrive_and_expect_tx(boxes * params_.box_rows * Traits::kLoadedRowBytes);
    __syncwarp();
    if (has_box(n_tile, box_)) {
      auto* to = smem + (slab_ * Traits::kBlockN + box_ * params_.box_rows) * Traits::kSlabColumns;
      tma_load<Traits::kCluster>(map_, full, to, slab_ * Traits::kSlabColumns, box.row, kv_head_, box.outer);
    }
  }

 private:
  static_assert(Traits::kBlockN / 16 * Traits::kSlabs <= 32 * (Traits::kSkip ? 1 : 2) * Traits::kCluster,
                "a lane has one box of a tile");

  // Pages past the last key are not loaded and their numbers not read; what the stage holds there instead is masked.
  __device__ bool has_box(int n_tile, int box) const {
    const int rows = table_ ? min(Traits::kBlockN, seqlen_k_ - n_tile * Traits::kBlockN) : Traits::kBlockN;
    return box * params_.box_rows < rows;
  }

  const FwdParams& params_;
  const CUtensorMap& map_;
  const int* table_ = nullptr;  // of this sequence's pages
  const int* list_ = nullptr;   // of those that this head attends to; null is all
  int seqlen_k_, kv_head_;
  int token0_ = 0, batch_ = 0;      // where keys without pages begin
  int slab_, box_;                  // this lane's box in every tile
  int boxes_of_[Traits::kCluster];  // and this lane's in each block of the cluster
};

// The boxes of the tiles of one item, looked up by windows: a lane finds one box, all lanes those of as many tiles as
// that makes, and shuffles bring them to the lanes that load. While one window is used the next is looked up, its list
// with one tile and its numbers with another: of one tile they would take as long as the tile, and what is done before
// the first is asked for makes all wait.
template <class Traits>
class Window {
  static constexpr int kBoxes = Traits::kBlockN / 16, kTiles = 32 / kBoxes;  // as many as there are for small pages
  static_assert(kTiles > 2, "the next window is there when it is needed");

 public:
  __device__ Window(const TileLoader<Traits>& loader, const Work& work)
      : loader_(loader), n_begin_(work.n_begin), top_(work.n_end - 1), now_(loader.numbered(loader.listed(place(0)))) {}

  // This lane's box of tile n. Tiles are asked for one by one, from the last to the first.
  __device__ Box at(int n, int) {
    const int used = top_ - n;
    if (used == 1) listed_ = loader_.listed(place(1));
    if (used == 2) next_ = loader_.numbered(listed_);
    if (used == kTiles) {
      top_ -= kTiles;
      now_ = next_;
    }
    const int lane = (top_ - n) * kBoxes + loader_.box();
    return {__shfl_sync(~0u, now_.outer, lane), __shfl_sync(~0u, now_.row, lane)};
  }

 private:
  // Of this lane, windows ahead.
  __device__ Box place(int ahead) const {
    const int lane = threadIdx.x % 32, n = top_ - ahead * kTiles - lane / kBoxes;
    return lane < kTiles * kBoxes && n >= n_begin_ ? loader_.place(n, lane % kBoxes) : Box{-1, 0};
  }

  const TileLoader<Traits>& loader_;
  const int n_begin_;
  int top_;  // the window's last tile
  Box now_, listed_, next_;
};

// The same by single tiles, one ahead: for walks that leave tiles out, tiles with much to compute, and producers with
// few registers.
template <class Traits>
class OneAhead {
 public:
  __device__ OneAhead(const TileLoader<Traits>& loader, const Work& work)
      : loader_(loader), n_begin_(work.n_begin), next_(loader.find(work.n_end - 1)) {}

  // `below` is the tile after n.
  __device__ Box at(int n, int below) {
    const Box box = next_;
    if (n > n_begin_) next_ = loader_.find(below);
    return box;
  }

 private:
  const TileLoader<Traits>& loader_;
  const int n_begin_;
  Box next_;
};

// The queries of one item, warpgroup by warpgroup: one is refilled while another still reads its own.
template <class Traits>
class QueryLoader {
 public:
  __device__ void load(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work) {
    const Packing& packing = params.packing;
    const int bytes = packing.tokens_per_warpgroup * packing.pack * Traits::kQueryRowBytes * Traits::kSlabs;
    if (Traits::kConsumerWarpgroups > 1) prefetch(params, work);
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
  // Into L2, for the time until the warpgroups have read the queries before.
  __device__ void prefetch(const FwdParams& params, const Work& work) const {
    const int lane = threadIdx.x % 32, warpgroup = lane / Traits::kSlabs;
    if (warpgroup >= Traits::kConsumerWarpgroups) return;
    const Rows rows(params.packing, work.seq, work.m_tile, first_warpgroup<Traits>() + warpgroup);
    if (rows.used <= 0) return;
    SM90_TMA_LOAD_4D::PREFETCH::copy(&params.map_q, lane % Traits::kSlabs * Traits::kSlabColumns,
                                     work.head_tile * params.packing.pack, work.seq.q_begin + rows.first_token,
                                     params.lengths.cu_seqlens_q ? 0 : work.batch);
  }

  uint32_t phases_ = 0;  // one bit a warpgroup
};

// With how many tiles of an item to go the next one is asked for: later where no list must be read for it.
template <class Traits>
constexpr int kAskAt = Traits::kSkip ? 3 : 2;

// The work of one ring, from the last tile to the first, so that masked tiles come first. Calls `begun` once, after the
// first tile is loaded, and `nearly_done` once, with kAskAt tiles to go or all of fewer; after the first of these is
// loaded where the planning warp loads as well.
template <class Traits, class Walk, class Begun, class NearlyDone>
__device__ void produce_tiles(const TileLoader<Traits>& loader, const Work& work, Walk walk,
                              const typename Traits::Loads& loads, Ring<Traits::kLoadStages>& ring, const Begun& begun,
                              const NearlyDone& nearly_done) {
  conditional_t<Traits::kMoveRegisters, OneAhead<Traits>, Window<Traits>> boxes(loader, work);
  int left = walk.tiles(work);
  const int ask_at = min(kAskAt<Traits>, left);
  for (int n = work.n_end - 1, below; n >= work.n_begin; n = below) {
    below = walk.below(n);
    const Box box = boxes.at(n, below);
    const bool nearly = left-- == ask_at;
    if (nearly && Traits::kMoveRegisters) nearly_done();
    loads.empty[ring.stage].wait(ring.phase ^ 1);
    loader.load(loads.full[ring.stage], loads.tiles + ring.stage * Traits::kBlockN * Traits::kHeadDim, n, box);
    ring.advance();
    if (n == work.n_end - 1) begun();
    if (nearly && !Traits::kMoveRegisters) nearly_done();
  }
}

// What a producer warp does. Warp 0 of a cluster's first block asks for the work and tells all others, producers and
// consumers, through the work ring. Where K and V take two warps each, the first and the last warp have two jobs: tiles
// of pages keep a warp busy, and V is not needed as soon as K.
template <class Traits>
struct Job {
  bool plans, loads_k, loads_v, loads_q;
  bool asks;   // tells the planning warp when the block will soon need another item
  bool ahead;  // the planning warp loads too: it can't be told, and takes items early
  int part;    // which of the warps that load this operand

  __device__ Job(const FwdParams& params, int warp) {
    const bool first_block = Cluster<Traits::kCluster>::rank() == 0, two_jobs = load_warps<Traits>(params) == 2;
    plans = warp == 0 && first_block;
    loads_k = two_jobs ? warp % 2 == 0 : warp == 1;
    loads_v = two_jobs ? warp % 2 == 1 : warp == 2;
    loads_q = warp == Traits::kProducerWarps - 1;
    asks = !two_jobs && loads_k && first_block;
    ahead = two_jobs;
    part = two_jobs ? warp / 2 : 0;
  }
};

// The planning warp's part: the next item, its list, and word of both to all others.
template <class Traits>
class Planner {
 public:
  // With `deals` it deals listed pages itself, else what the plan says.
  __device__ Planner(const FwdParams& params, typename Traits::SharedStorage& smem, bool ahead, bool deals)
      : smem_(smem),
        ahead_(ahead),
        deals_(deals),
        scheduler_(params, Cluster<Traits::kCluster>::worker(), ahead && Traits::kMoveRegisters, deals),
        pages_(params, Cluster<Traits::kCluster>::worker()),
        keeper_(params, smem) {}

  __device__ Work next(WorkRing<Traits>& ring_work, bool first = false) {
    keeper_.make_room();
    // Not before it is wanted: an item taken early is one that an idle block can't have.
    if (!ahead_ && items_ > 0) smem_.work_wanted.wait((items_ - 1) & 1);
    ++items_;
    Work work = next_item(first);
    keeper_.open(work);
    ring_work.put(work);
    return work;
  }
  // Whether each producer warp can find the first item for itself, sooner than through the ring: `start` then, instead
  // of the first `next`, and `say` by the planning warp.
  __device__ bool started() const { return scheduler_.started(); }
  __device__ Work start() {
    ++items_;
    return scheduler_.start();
  }
  __device__ void say(WorkRing<Traits>& ring_work, const Work& work) const { ring_work.put(work); }
  // After the last item.
  __device__ void close() { keeper_.close(); }

 private:
  __device__ Work next_item(bool first) {
    if constexpr (Traits::kPageLists) {
      if (deals_) return first ? pages_.first() : pages_.next();
    }
    return scheduler_.next();
  }

  typename Traits::SharedStorage& smem_;
  const bool ahead_, deals_;
  uint32_t items_ = 0;
  Scheduler<Traits::kSkip, !Traits::kMoveRegisters> scheduler_;
  PageScheduler<Traits::kBlockN> pages_;
  ListKeeper<Traits> keeper_;
};

template <class Traits>
__device__ void produce(const FwdParams& params, typename Traits::SharedStorage& smem, int warp, bool listed) {
  const Job<Traits> job(params, warp);
  WorkRing<Traits> ring_work(smem);
  Planner<Traits> planner(params, smem, job.ahead, listed && params.step_lists.indices);
  if (Traits::kSkip && job.plans) {  // and does nothing else: a loop of its own needs fewer registers
    while (planner.next(ring_work).parts != 0) {
    }
    planner.close();
    return;
  }
  Ring<Traits::kLoadStages> ring;
  QueryLoader<Traits> queries;
  ListReader<Traits> lists(smem);
  // The next item, where this warp has it already. The first one is found by code of its own, and told to the others
  // when its first keys have been asked for.
  Work next;
  bool planned = false, unsaid = false;
  if constexpr (!Traits::kSkip) {
    if (planner.started()) {
      next = planner.start();
      planned = true;
      unsaid = job.plans;
      if (!job.plans) ring_work.pass();
    } else if (Traits::kPageLists && job.plans) {
      next = planner.next(ring_work, true);
      planned = true;
    }
  }
  auto say = [&](const Work& work) {
    if (unsaid) planner.say(ring_work, work);
    unsaid = false;
  };
  auto want = [&] {
    if (job.asks && threadIdx.x % 32 == 0) smem.work_wanted.arrive();
  };
  auto ask = [&] {
    want();
    // One consumer warpgroup is soon done: its next item is looked for while this one's last tiles are on their way.
    if (!Traits::kMoveRegisters && job.plans) {
      next = planner.next(ring_work);
      planned = true;
    }
  };
  // What runs for the first time is slow: while lists are made, loaders rehearse on an item that has no tiles.
  for (bool rehearse = Traits::kPageLists && listed && !planned;; rehearse = false) {
    Work work;
    if (rehearse) {
      work = {};
      work.parts = 1;
    } else if (!Traits::kSkip && planned) {
      work = next;
      planned = false;
    } else if (!Traits::kSkip && job.plans) {
      work = planner.next(ring_work);
    } else {
      work = ring_work.get();
      ring_work.release();
    }
    const bool empty = work.n_begin >= work.n_end && !rehearse;
    if (empty || !job.loads_k) say(work);
    if (work.parts == 0) break;
    if (empty) {
      want();
      continue;
    }
    if (job.loads_q) queries.load(params, smem, work);
    if (job.loads_k || job.loads_v) {
      const int kv_head = params.packing.kv_head(work.head_tile);
      TileLoader<Traits> loader(params, job.loads_v ? params.map_v : params.map_k, work, kv_head, job.part, listed);
      auto walk = lists.walk(work);
      job.loads_v ? produce_tiles<Traits>(
                        loader, work, walk, Traits::v_loads(smem), ring, [] {}, [] {})
                  : produce_tiles<Traits>(loader, work, walk, Traits::k_loads(smem), ring, [&] { say(work); }, ask);
    }
    lists.leave();
  }
}

}  // namespace lite_attention::sm90

// The producer warps of kernels with skip lists. One plans, one loads K, one V, one Q: none of them waits for another's
// job, so the next item's list is read and its first tiles arrive while the consumers end the item before.
#pragma once

#include "sm90/producer.cuh"
#include "sm90/skip_list.cuh"

namespace lite_attention::sm90 {

// The visited tiles of one ring. Calls `nearly_done` once, with two tiles to go.
template <class Traits, class NearlyDone>
__device__ void produce_visits(const TileLoader<Traits>& loader, const Work& work, ListWalk walk,
                               typename Traits::FullBarrier* full, typename Traits::EmptyBarrier* empty,
                               typename Traits::Element* tiles, Ring<Traits::kStages>& ring,
                               const NearlyDone& nearly_done) {
  Box box = loader.find(work.n_end - 1);
  for (int n = work.n_end - 1, below; n >= work.n_begin; n = below) {
    below = walk.below(n);
    Box next = n > work.n_begin ? loader.find(below) : Box{};
    if (below == work.n_begin || work.n_end - work.n_begin == 1) nearly_done();
    empty[ring.stage].wait(ring.phase ^ 1);
    loader.load(full[ring.stage], tiles + ring.stage * Traits::kBlockN * Traits::kHeadDim, n, box);
    ring.advance();
    box = next;
  }
}

template <class Traits>
__device__ void produce_lists(const FwdParams& params, typename Traits::SharedStorage& smem, int warp) {
  static_assert(Traits::kLoadWarps == 1 && Traits::kCluster == 1, "a warp for each job, lists of one block");
  const bool plans = warp == 0, loads_k = warp == 1, loads_v = warp == 2, loads_q = warp == 3;
  Ring<Traits::kStages> ring;
  WorkRing<Traits> ring_work(smem);
  QueryLoader<Traits> queries;
  Scheduler<false> scheduler(params, Cluster<1>::worker());
  ListReader<Traits> lists(smem);
  ListKeeper<Traits> keeper(params, smem);
  auto ask = [&] {
    if (loads_k && threadIdx.x % 32 == 0) smem.lists.work_wanted.arrive();
  };
  for (uint32_t items = 0;; ++items) {
    Work work;
    if (plans) {
      // Not before it is wanted: an item taken early is one that an idle block can't have.
      if (items > 0) smem.lists.work_wanted.wait((items - 1) & 1);
      work = scheduler.next();
      keeper.open(work);
      ring_work.put(work);
    } else {
      work = ring_work.get();
    }
    if (work.parts == 0) break;
    if (work.n_begin >= work.n_end) {
      ask();
      continue;
    }
    if (loads_q) queries.load(params, smem, work);
    if (loads_k || loads_v) {
      int kv_head = work.head_tile * params.packing.pack / params.packing.heads_per_kv;
      TileLoader<Traits> loader(params, loads_v ? params.map_v : params.map_k, work, kv_head, 0);
      const ListWalk walk = lists.walk(work);
      loads_v ? produce_visits<Traits>(loader, work, walk, smem.v_full, smem.v_empty, smem.v, ring, ask)
              : produce_visits<Traits>(loader, work, walk, smem.k_full, smem.k_empty, smem.k, ring, ask);
    }
    lists.leave();
  }
  if (plans) keeper.close();
}

}  // namespace lite_attention::sm90

// Deals the listed pages of a decode step without a plan: between the lists and the attention that reads them there is
// time for no other kernel.
//
// The tiles of all lists, laid end to end, are cut into equal runs as a plan does it (plan.cuh). Each worker finds its
// own from the lists' counts alone: that the last page may not be full changes no number of tiles, as tiles are whole
// pages. A list has the rows of one tile.
#pragma once

#include "dependent_launch.cuh"
#include "pages/layout.cuh"
#include "sm90/plan.cuh"
#include "sm90/traits.cuh"
#include "warp_scan.cuh"

namespace lite_attention::sm90 {

// Whether this launch walks lists of pages: those that the plan deals, or those of a step where any sequence has one.
template <class Traits>
__device__ bool walks_lists(const FwdParams& params) {
  if constexpr (!Traits::kPageLists) return false;
  return params.lengths.lists.indices || (params.step_lists.indices && *Plan::listed(params.plan));
}

// The planning warp's side, as Scheduler is that of a plan.
template <int kBlockN>
class PageScheduler {
  static constexpr int kPage = pages::kPage, kPagesOfTile = kBlockN / kPage;

 public:
  __device__ PageScheduler(const FwdParams& params, int worker) : params_(params), worker_(worker) {}

  // Waits for the lists. What runs for the first time is slow, presumably as its instructions are to be fetched: so it
  // is rehearsed, on whatever is there, while the lists are made.
  __device__ Work first() {
    Work work;
#pragma unroll 1
    for (int take = 0; take < 2; ++take) {
      if (take == 1) wait_for_kernels_before();
      begin();
      work = next();
    }
    return work;
  }

  // All lanes call together and get the same.
  __device__ Work next() {
    Work work{};
    if (position_ >= end_) return work;
    const Lengths& lengths = params_.lengths;
    const PageLists& lists = params_.step_lists;
    const int batch = unsigned(list_) / unsigned(lists.heads), count = count_of(list_);
    const int q_begin = lengths.cu_seqlens_q[batch], q_end = lengths.cu_seqlens_q[batch + 1];
    const int keys = min(max(lengths.seqused_k[batch], 0), lists.max_pages * kPage);
    const int tiles = tiles_of(count), weight = max(1, tiles), taken = min(weight - tile_, end_ - position_);
    const int item = position_ - tile_;
    work.batch = batch;
    work.head_tile = list_ - batch * lists.heads;
    work.n_begin = tile_;
    work.n_end = tile_ + min(taken, tiles);
    work.first_run = tile_ == 0 ? worker_ : int(unsigned(item) / unsigned(run_));
    work.part = worker_ - work.first_run;
    work.parts = int(unsigned(item + weight - 1) / unsigned(run_)) - work.first_run + 1;
    // The newest page is always listed: it alone may not be full.
    const int missing = (kPage - keys % kPage) % kPage;
    work.seq = {q_begin, 0, q_end - q_begin, count > 0 ? count * kPage - missing : 0};
    position_ += taken;
    tile_ += taken;
    if (tile_ == weight) ++list_, tile_ = 0;
    return work;
  }

 private:
  // Finds this worker's run.
  __device__ void begin() {
    const int count = lists(), lane = threadIdx.x % 32;
    // Of each 32 neighbouring groups of 32 lists, or of several such, a lane has the tiles of one.
    const int groups_of_lane = (count + 1023) / 1024;
    int own = 0, its_lane = 0, left = groups_of_lane;
#pragma unroll 4
    for (int first = 0; first < count; first += 32) {
      const int sum = __reduce_add_sync(~0u, weight_at(first + lane));
      own += lane == its_lane ? sum : 0;
      if (--left == 0) ++its_lane, left = groups_of_lane;
    }
    const int inclusive = inclusive_sum(own), total = __shfl_sync(~0u, inclusive, 31);
    run_ = (unsigned(total) + unsigned(params_.num_workers) - 1) / unsigned(params_.num_workers);
    position_ = min(total, worker_ * run_);
    end_ = min(total, position_ + run_);
    if (position_ >= end_) return;
    const int found = __ffs(__ballot_sync(~0u, inclusive > position_)) - 1;
    int before = __shfl_sync(~0u, inclusive - own, found), first = found * groups_of_lane * 32;
    while (first < count) {
      const int mine = weight_at(first + lane), up_to = before + inclusive_sum(mine);
      const uint32_t beyond = __ballot_sync(~0u, up_to > position_);
      if (beyond) {
        const int at = __ffs(beyond) - 1;
        list_ = first + at;
        tile_ = position_ - __shfl_sync(~0u, up_to - mine, at);
        return;
      }
      before = __shfl_sync(~0u, up_to, 31);
      first += 32;
    }
  }

  __device__ int lists() const { return params_.lengths.batch * params_.step_lists.heads; }
  __device__ static int tiles_of(int count) { return (count + kPagesOfTile - 1) / kPagesOfTile; }
  // Not by the L1 cache, which may have what was there before.
  __device__ int count_of(int list) const { return __ldcg(params_.step_lists.counts + list); }
  // Rows that see no key still have zeros to write.
  __device__ int weight_at(int list) const { return list < lists() ? max(1, tiles_of(count_of(list))) : 0; }

  const FwdParams& params_;
  const int worker_;
  int run_ = 1;                 // tiles of a worker
  int position_ = 0, end_ = 0;  // in its own
  int list_ = 0, tile_ = 0;     // the next one to be given out, and where in it
};

}  // namespace lite_attention::sm90

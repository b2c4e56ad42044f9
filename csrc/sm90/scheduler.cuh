// Deals the plan's work to this block: one producer warp asks for it and tells the others through shared memory
// (pipeline.cuh).
#pragma once

#include "sm90/plan.cuh"

namespace lite_attention::sm90 {

struct Work {
  int batch, m_tile, head_tile;
  int n_begin, n_end;  // KV tiles of this part; none where the rows see no key
  int parts;           // blocks that share this item; 1 is unsplit, 0 is the end of all work
  int first_cta;       // the block that has the item's first tiles
};

// The scheduling warp's side. All lanes call together and get the same.
class Scheduler {
 public:
  __device__ explicit Scheduler(const FwdParams& params)
      : plan_(params.plan), header_(*plan_.header), head_tiles_(params.packing.head_tiles) {
    if (header_.mode == PlanMode::kWhole) {
      position_ = blockIdx.x;
      end_ = int64_t{header_.num_entries} * head_tiles_;
    } else {
      position_ = min(header_.total, blockIdx.x * header_.run);
      end_ = min(header_.total, position_ + header_.run);
      if (position_ < end_) entry_ = find_entry(int(position_ / head_tiles_));
    }
  }

  __device__ Work next() {
    if (position_ >= end_) {
      if (header_.mode == PlanMode::kWhole) leave();
      return {};
    }
    return header_.mode == PlanMode::kWhole ? next_whole() : next_run();
  }

 private:
  // Heads outermost: the blocks at work at one time share a few heads' K and V, which then stay in L2.
  __device__ Work next_whole() {
    int item = int(position_), head = item / header_.num_entries;
    int4 entry = plan_.entries[item - head * header_.num_entries];
    int taken = threadIdx.x % 32 == 0 ? atomicAdd(&plan_.header->taken, 1) : 0;
    position_ = gridDim.x + __shfl_sync(~0u, taken, 0);
    return {entry.x, entry.y, head, entry.z, entry.z + entry.w, 1, int(blockIdx.x)};
  }

  // The last block to find nothing more resets the counters for the next launch under this plan.
  __device__ void leave() const {
    if (threadIdx.x % 32 == 0 && atomicAdd(&plan_.header->finished, 1) == int(gridDim.x) - 1) {
      plan_.header->taken = plan_.header->finished = 0;
    }
  }

  __device__ Work next_run() {
    int begin = plan_.prefix[entry_], weight = plan_.prefix[entry_ + 1] - begin;
    int64_t inside = position_ - int64_t{begin} * head_tiles_;
    int head = int(inside / weight), first = int(inside - int64_t{head} * weight);
    int count = int(min(int64_t{weight - first}, end_ - position_));
    int64_t item_begin = position_ - first, item_last = item_begin + weight - 1;
    int first_cta = int(item_begin / header_.run), last_cta = int(item_last / header_.run);
    int4 entry = plan_.entries[entry_];
    int n_begin = entry.z + first;
    position_ += count;
    if (first + count == weight && head + 1 == head_tiles_) ++entry_;
    return {entry.x, entry.y, head, n_begin, n_begin + min(count, entry.w), last_cta - first_cta + 1, first_cta};
  }

  // The last entry whose prefix is at most target; the warp probes 32 places at a time.
  __device__ int find_entry(int target) const {
    int lo = 0, count = header_.num_entries, lane = threadIdx.x % 32;
    while (count > 1) {
      int step = (count + 31) / 32, probe = lo + lane * step;
      bool at_most = lane * step < count && plan_.prefix[probe] <= target;
      int hit = 31 - __clz(__ballot_sync(~0u, at_most));  // probe 0 always qualifies
      lo += hit * step;
      count = min(step, count - hit * step);
    }
    return lo;
  }

  Plan plan_;
  PlanHeader header_;
  int head_tiles_;
  int64_t position_, end_;
  int entry_ = 0;
};

}  // namespace lite_attention::sm90

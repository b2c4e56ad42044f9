// Deals the plan's work to this worker, a block or a cluster: one producer warp asks for it and tells the others
// through shared memory (pipeline.cuh).
#pragma once

#include "sm90/plan.cuh"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

struct Work {
  int batch, m_tile, head_tile;
  int n_begin, n_end;  // KV tiles of this part; none where the rows see no key
  int parts;           // workers that share this item; 1 is unsplit, 0 is the end of all work
  int first_worker;    // the one that has the item's first tiles
  Sequence seq;        // read once here, so that nobody else waits for device memory
};

// The planning warp's side. All lanes call together and get the same. With `kWhole` items are never split: what is left
// out then matters to a warp with few registers.
template <bool kWhole>
class Scheduler {
 public:
  // `ahead` takes the next item while this one is given out: nobody waits for it then, but an idle worker can't have it
  // any more.
  __device__ Scheduler(const FwdParams& params, int worker, bool ahead)
      : plan_(params.plan),
        header_(*plan_.header),
        lengths_(params.lengths),
        head_tiles_(params.packing.head_tiles),
        worker_(worker),
        ahead_(ahead) {
    if (takes()) {
      position_ = worker;
      end_ = int64_t{header_.num_entries} * head_tiles_;
    } else {
      position_ = min(header_.total, worker * header_.run);
      end_ = min(header_.total, position_ + header_.run);
      if (position_ < end_) entry_ = find_entry(int(position_ / head_tiles_));
    }
  }

  // Whether items are taken one by one, and were not dealt out by the plan.
  __device__ bool takes() const { return kWhole || header_.mode == PlanMode::kWhole; }

  __device__ Work next() {
    Work work{};
    if (takes() && !ahead_) take();
    if (position_ >= end_) {
      if (takes()) leave();
      return work;
    }
    takes() ? next_whole(work) : next_run(work);
    work.seq = Sequence::load(lengths_, work.batch);
    if (lengths_.lists.indices) {
      work.head_tile += work.batch % lengths_.lists.heads * head_tiles_;
      work.batch /= lengths_.lists.heads;
    }
    return work;
  }

 private:
  // Heads outermost: the workers at one time share one or a few heads' K and V, which then stay in L2. The last
  // heads are walked side by side, longest entries first, so that the last items to be taken are short and all workers
  // end together.
  __device__ void next_whole(Work& work) {
    int item = int(position_), single = (head_tiles_ - header_.last_heads) * header_.num_entries;
    int head, entry_index;
    if (item < single) {
      head = item / header_.num_entries;
      entry_index = item - head * header_.num_entries;
    } else {
      entry_index = (item - single) / header_.last_heads;
      head = head_tiles_ - header_.last_heads + (item - single) - entry_index * header_.last_heads;
    }
    int4 entry = plan_.entries[entry_index];
    if (ahead_) take();
    work.batch = entry.x;
    work.m_tile = entry.y;
    work.head_tile = head;
    work.n_begin = entry.z;
    work.n_end = entry.z + entry.w;
    work.parts = 1;
    work.first_worker = worker_;
  }

  // The next position. Every worker begins with the item of its own number.
  __device__ void take() {
    if (!ahead_ && !began_) {
      began_ = true;
      return;
    }
    int taken = threadIdx.x % 32 == 0 ? atomicAdd(&plan_.header->taken, 1) : 0;
    position_ = header_.num_workers + __shfl_sync(~0u, taken, 0);
  }

  // The last worker to find nothing more resets the counters for the next launch under this plan.
  __device__ void leave() const {
    if (threadIdx.x % 32 == 0 && atomicAdd(&plan_.header->finished, 1) == header_.num_workers - 1) {
      plan_.header->taken = plan_.header->finished = 0;
    }
  }

  __device__ void next_run(Work& work) {
    int begin = plan_.prefix[entry_], weight = plan_.prefix[entry_ + 1] - begin;
    int64_t inside = position_ - int64_t{begin} * head_tiles_;
    int head = int(inside / weight), first = int(inside - int64_t{head} * weight);
    int count = int(min(int64_t{weight - first}, end_ - position_));
    int64_t item_begin = position_ - first, item_last = item_begin + weight - 1;
    int4 entry = plan_.entries[entry_];
    work.batch = entry.x;
    work.m_tile = entry.y;
    work.head_tile = head;
    work.n_begin = entry.z + first;
    work.n_end = work.n_begin + min(count, entry.w);
    work.first_worker = int(item_begin / header_.run);
    work.parts = int(item_last / header_.run) - work.first_worker + 1;
    position_ += count;
    if (first + count == weight && head + 1 == head_tiles_) ++entry_;
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
  const Lengths& lengths_;
  int head_tiles_, worker_;
  int64_t position_, end_;
  int entry_ = 0;
  const bool ahead_;
  bool began_ = false;
};

}  // namespace lite_attention::sm90

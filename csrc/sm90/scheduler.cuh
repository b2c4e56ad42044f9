// Deals the plan's work to this worker, a block or a cluster: one producer warp asks for it and tells the others
// through shared memory (pipeline.cuh).
#pragma once

#include "sm90/plan.cuh"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {

// The planning warp's side. All lanes call together and get the same. What the plan says is read again for every item:
// the producer has few registers. With `kWhole` items are never split: what is left out then matters to it as well.
// With `kStarts` it has the registers for a Start.
template <bool kWhole, bool kStarts>
class Scheduler {
 public:
  // `ahead` takes the next item while this one is given out: nobody waits for it then, but an idle worker can't have it
  // any more. An `idle` one is never asked.
  __device__ Scheduler(const FwdParams& params, int worker, bool ahead, bool idle)
      : params_(params), worker_(worker), ahead_(ahead) {
    if (idle) return;
    if constexpr (kStarts) {
      start_ = reinterpret_cast<const Start*>(params.plan + Plan::starts(params.num_workers))[worker];
    }
    if constexpr (!kWhole) begin_run(Plan(params.plan));
  }

  // Whether the first item is in every warp's Start.
  __device__ bool started() const { return kStarts && start_.valid; }

  // That item, instead of the first `next`: by less code, as all wait for it.
  __device__ Work start() {
    if (position_ >= end_) return {};
    second_ = true;
    return started_item(start_.items[0]);
  }

  __device__ Work next() {
    const Plan plan(params_.plan);
    Work work{};
    if (!takes_ && position_ >= end_) {
      begin_taking(plan);
    } else if (takes_ && !ahead_) {
      take(plan);
    }
    if (position_ >= end_) {
      leave(plan);
      return work;
    }
    if (kStarts && second_) {
      second_ = false;
      return started_item(start_.items[1]);
    }
    if (kWhole || takes_) {
      next_whole(plan, work);
    } else {
      next_run(plan, work);
    }
    work.seq = Sequence::load(params_.lengths, work.batch);
    work.to_call(params_.lengths.lists, params_.packing);
    return work;
  }

 private:
  // One of the run's, with what a plan may not know.
  __device__ Work started_item(Work work) {
    const Lengths& lengths = params_.lengths;
    position_ += max(1, work.n_end - work.n_begin);
    if (!lengths.cu_seqlens_q) work.seq.q_begin = 0;
    work.seq.k_begin = lengths.cu_seqlens_k ? lengths.cu_seqlens_k[work.batch] : 0;
    return work;
  }

  // Heads outermost: the workers at one time share one or a few heads' K and V, which then stay in L2. The last
  // heads are walked side by side, longest entries first, so that the last items to be taken are short and all workers
  // end together.
  __device__ void next_whole(const Plan& plan, Work& work) {
    const int num_entries = plan.header->num_entries, last_heads = plan.header->last_heads;
    const int first_heads = params_.packing.head_tiles - last_heads;
    int item = int(position_), single = first_heads * num_entries;
    int head, entry_index;
    if (item < single) {
      head = item / num_entries;
      entry_index = item - head * num_entries;
    } else {
      entry_index = (item - single) / last_heads;
      head = first_heads + (item - single) - entry_index * last_heads;
    }
    int4 entry = plan.entries[entry_index];
    if (ahead_) take(plan);
    work.batch = entry.x;
    work.m_tile = entry.y;
    work.head_tile = head;
    work.n_begin = entry.z;
    work.n_end = entry.z + entry.w;
    work.parts = 1;
  }

  // Every worker begins with the item of its own number.
  __device__ void begin_taking(const Plan& plan) {
    takes_ = true;
    position_ = plan.header->first_whole + worker_;
    end_ = plan.header->num_items;
  }

  __device__ void take(const Plan& plan) {
    int taken = threadIdx.x % 32 == 0 ? atomicAdd(&plan.header->taken, 1) : 0;
    position_ = plan.header->first_whole + plan.header->num_workers + __shfl_sync(~0u, taken, 0);
  }

  // The last worker to find nothing more resets the counters for the next launch under this plan.
  __device__ void leave(const Plan& plan) const {
    if (plan.header->first_whole == plan.header->num_items) return;
    if (threadIdx.x % 32 == 0 && atomicAdd(&plan.header->finished, 1) == plan.header->num_workers - 1) {
      plan.header->taken = plan.header->finished = 0;
    }
  }

  __device__ void begin_run(const Plan& plan) {
    if (kStarts && start_.valid) {
      position_ = start_.position;
      end_ = start_.end;
      entry_ = start_.entry;
      place_ = start_.place;
      head_begin_ = start_.head_begin;
      return;
    }
    const PlanHeader& header = *plan.header;
    const Columns columns(header.columns, header.num_workers);
    if (!columns.has(worker_)) return;
    position_ = min(header.streamed, columns.run(worker_) * header.run);
    end_ = min(header.streamed, position_ + header.run);
    if (position_ >= end_) return;
    const int64_t head_weight = plan.prefix[header.num_entries];
    place_ = int(position_ / head_weight);
    head_begin_ = place_ * head_weight;
    entry_ = find_entry(plan, int(position_ - head_begin_));
  }

  __device__ void next_run(const Plan& plan, Work& work) {
    const PlanHeader& header = *plan.header;
    const Columns columns(header.columns, header.num_workers);
    const int column = columns.column(worker_);
    const int begin = plan.prefix[entry_], weight = plan.prefix[entry_ + 1] - begin;
    const int4 entry = plan.entries[entry_];
    const int first = int(position_ - head_begin_) - begin;
    const int count = int(min(int64_t{weight - first}, end_ - position_));
    const int64_t item_begin = position_ - first;
    const int first_run = int(item_begin / header.run);
    work.batch = entry.x;
    work.m_tile = entry.y;
    work.head_tile = columns.head_tile(place_, column);
    work.n_begin = entry.z + first;
    work.n_end = work.n_begin + min(count, entry.w);
    work.first_run = columns.first_run(column) + first_run;
    work.part = columns.run(worker_) - first_run;
    work.parts = int((item_begin + weight - 1) / header.run) - first_run + 1;
    position_ += count;
    if (first + count == weight && ++entry_ == header.num_entries) {
      entry_ = 0;
      head_begin_ = position_;
      ++place_;
    }
  }

  // The last entry whose prefix is at most target; the warp probes 32 places at a time.
  __device__ static int find_entry(const Plan& plan, int target) {
    int lo = 0, count = plan.header->num_entries, lane = threadIdx.x % 32;
    while (count > 1) {
      int step = (count + 31) / 32, probe = lo + lane * step;
      bool at_most = lane * step < count && plan.prefix[probe] <= target;
      int hit = 31 - __clz(__ballot_sync(~0u, at_most));  // probe 0 always qualifies
      lo += hit * step;
      count = min(step, count - hit * step);
    }
    return lo;
  }

  const FwdParams& params_;
  const int worker_;
  int64_t position_ = 0, end_ = 0;
  int64_t head_begin_ = 0;  // where the head begins that is streamed now, the `place_`th of its column
  int place_ = 0, entry_ = 0;
  Start start_{};
  bool second_ = false;  // of its items is the next one
  const bool ahead_;
  bool takes_ = false;  // items one by one, and is through with its run
};

}  // namespace lite_attention::sm90

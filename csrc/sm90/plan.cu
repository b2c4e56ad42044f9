#include "sm90/plan.cuh"

#include <climits>

#include "dependent_launch.cuh"
#include "sm90/sequence.cuh"
#include "warp_scan.cuh"

namespace lite_attention::sm90 {
namespace {

constexpr int kPlanThreads = 1024;
// With this many items of few rows a worker, whole items balance within a few percent and no partial result is ever
// written.
constexpr int kWholeItemsPerWorker = 4;
// For items of many rows, what it takes to write and add up parts of them, in KV tiles a worker: 25 to 40 us.
constexpr float kPartsCost = 25.f;
// How much longer the tiles of a run take, as workers don't walk the same keys together: little where L2 holds a
// head's keys.
constexpr float kRunCost = 0.03f, kRunCostBeyondL2 = 0.25f;
constexpr int64_t kBytesInL2 = 24 << 20;
// Parts of an item that one block should have to add up.
constexpr int kMostParts = 8;

// What every step of making the plan reads again: in shared memory as far as there is room, since each look at device
// memory is as long as a step.
constexpr int kNear = kPlanThreads;
struct Near {
  Sequence sequences[kNear];  // by their place in the order
  int offsets[kNear + 1];     // first entry of each place
  int4 entries[kNear];        // of the plan
  int prefix[kNear + 1];      // of the plan

  // Not constructed: what it has in shared memory is written before it is read.
  static __device__ bool holds_sequences(const Lengths& lengths) { return lengths.planned() <= kNear; }
  static __device__ bool holds_entries(const PlanBounds& bounds) { return bounds.max_entries <= kNear; }
};

// Exclusive sum over the block's threads; total is the same for all of them.
__device__ int block_exclusive_sum(int value, int& total) {
  static_assert(kPlanThreads == 32 * 32, "a warp has the sums of all");
  __shared__ int warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int inclusive = inclusive_sum(value);
  __syncthreads();  // the sums of the call before have been read
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  const int of_warp = warp_sums[lane];
  total = __reduce_add_sync(~0u, of_warp);
  return __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + inclusive - value;
}

// A quotient of what is rarely large: 64 bits take several times as long.
__device__ int64_t quotient(int64_t value, int divisor) {
  return value >> 31 == 0 ? int64_t(uint32_t(value) / uint32_t(divisor)) : value / divisor;
}

// Maxima over the block's threads.
template <int kCount>
__device__ void block_max(int (&values)[kCount]) {
  __shared__ int of_warps[kCount][32];
  __syncthreads();  // the maxima of the call before have been read
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int of_warp = __reduce_max_sync(~0u, values[i]);
    if (threadIdx.x % 32 == 0) of_warps[i][threadIdx.x / 32] = of_warp;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __reduce_max_sync(~0u, of_warps[i][threadIdx.x % 32]);
}

// The lengths of a plan's items, in KV tiles.
struct Items {
  int count;
  int64_t total;
  int longest, shortest;
  int last_longest;  // of those that are taken last, one for each worker
  bool many_tiles;   // of queries in a sequence, on average
};

// How many of the first items are to be streamed, the others being taken whole: by when the last worker would be done.
__device__ int streamed_items(const Items& items, int workers, const Tile& tile) {
  const float equal = float(items.total) / workers;
  if (tile.block_m == kRowsPerWarpgroup) {
    // Tiles of few rows are bound by memory, wherever they are. Parts cost next to nothing, and end together.
    return items.count >= kWholeItemsPerWorker * workers && items.longest <= equal ? 0 : items.count;
  }
  // Items of like lengths go in rounds; of falling lengths, the last to end is on average half of one of the last.
  const int rounds = items.count / workers, rest = items.count - rounds * workers;
  const float mean = float(items.total) / max(items.count, 1);
  const float all_rounds = (rounds + (rest > 0)) * mean;
  const float all_whole = max(float(items.longest), min(all_rounds, equal + 0.5f * items.last_longest));
  // What full rounds would leave over can be streamed, with a round more where that would be many parts of few items.
  // Not where most items are of decode steps: it is memory that they wait for, and rounds cost nothing.
  const int first = rest < workers / kMostParts ? min(rest + workers, items.count) : rest;
  const int64_t head_bytes = int64_t{items.longest} * tile.block_n * tile.head_dim * 4;
  const float cost = head_bytes > kBytesInL2 ? kRunCostBeyondL2 : kRunCost;
  const float first_streamed =
      equal + 0.5f * (items.longest - items.shortest) + kPartsCost + cost * first * mean / workers;
  const float all_streamed = (1 + cost) * equal + kPartsCost;
  if (all_whole <= all_streamed && (all_whole <= first_streamed || !items.many_tiles)) return 0;
  return first_streamed <= all_streamed && items.many_tiles ? first : items.count;
}

__device__ int tiles_of(int tokens, const Packing& packing) {
  if (tokens > 0 && tokens <= packing.tokens_per_tile) return 1;  // a division less
  return (tokens + packing.tokens_per_tile - 1) / packing.tokens_per_tile;
}

// Sequences by falling number of keys, ties in their own order: the place of each is the number that come before it.
// Whole items balance best when long ones are taken first. Not worth its square of steps beyond what Near holds.
__device__ void order_sequences(const Lengths& lengths, int* order, bool longest_first, Near& near) {
  if (!Near::holds_sequences(lengths)) {
    for (int b = threadIdx.x; b < lengths.planned(); b += kPlanThreads) order[b] = b;
    __syncthreads();
    return;
  }
  const int b = threadIdx.x;
  const bool mine = b < lengths.planned();
  Sequence seq{};
  int place = b;
  if (mine) seq = Sequence::load(lengths, b);
  if (longest_first) {
    int* keys = near.prefix;
    if (mine) keys[b] = seq.seqlen_k;
    __syncthreads();
    place = 0;
    for (int other = 0; mine && other < lengths.planned(); ++other) {
      place += keys[other] > seq.seqlen_k || (keys[other] == seq.seqlen_k && other < b);
    }
  }
  if (mine) {
    near.sequences[place] = seq;
    order[place] = b;
  }
  __syncthreads();
}

__device__ Sequence sequence_at(int place, const Lengths& lengths, const int* order, const Near& near) {
  return Near::holds_sequences(lengths) ? near.sequences[place] : Sequence::load(lengths, order[place]);
}

// A worker's first items, as Scheduler::next_run finds them. Where such items are streamed, sequences are in their own
// order.
__device__ Start start_of(int worker, const PlanHeader& header, const int4* entries, const int* prefix,
                          const Lengths& lengths, const Packing& packing, const int* order, const Near& near) {
  const Columns columns(header.columns, header.num_workers);
  Start start{};
  start.valid = 1;
  if (!columns.has(worker)) return start;
  const int column = columns.column(worker), own_run = columns.run(worker);
  const int run = int(header.run), streamed = int(header.streamed), head_weight = prefix[header.num_entries];
  int position = min(streamed, own_run * run);
  const int end = min(streamed, position + run);
  start.position = position;
  start.end = end;
  int place = position / max(head_weight, 1), head_begin = place * head_weight;
  int entry = 0, above = header.num_entries;  // the last one that begins at or before the position
  while (above - entry > 1) {
    const int middle = (entry + above) / 2;
    (prefix[middle] <= position - head_begin ? entry : above) = middle;
  }
#pragma unroll
  for (Work& work : start.items) {
    if (position >= end) continue;
    const int begin = prefix[entry], weight = prefix[entry + 1] - begin, first = position - head_begin - begin;
    const int4 tiles = entries[entry];
    const int count = min(weight - first, end - position), item = position - first, item_run = item / run;
    work.batch = tiles.x;
    work.m_tile = tiles.y;
    work.head_tile = columns.head_tile(place, column);
    work.n_begin = tiles.z + first;
    work.n_end = work.n_begin + min(count, tiles.w);
    work.first_run = columns.first_run(column) + item_run;
    work.part = own_run - item_run;
    work.parts = (item + weight - 1) / run - item_run + 1;
    work.seq = sequence_at(work.batch, lengths, order, near);
    if (!lengths.cu_seqlens_q) work.seq.q_begin = work.batch * lengths.seqlen_q;
    work.to_call(lengths.lists, packing);
    position += count;
    if (first + count == weight && ++entry == header.num_entries) {
      entry = 0;
      head_begin = position;
      ++place;
    }
  }
  start.entry = entry;
  start.place = place;
  start.head_begin = head_begin;
  return start;
}

// Whether any sequence is not whole.
__device__ bool any_listed(const Lengths& lengths, const WholeSequences& whole) {
  if (whole.min_context <= 0 && !whole.marked) return true;
  bool any = false;
  for (int b = threadIdx.x; b < lengths.batch; b += kPlanThreads) {
    const int keys = lengths.seqused_k ? lengths.seqused_k[b] : lengths.seqlen_k;
    any = any || (keys >= whole.min_context && !(whole.marked && whole.marked[b]));
  }
  return __syncthreads_or(any);
}

__global__ __launch_bounds__(kPlanThreads) void plan_kernel(int* words, PlanBounds bounds, Lengths lengths,
                                                            WholeSequences whole, Packing packing, Tile tile,
                                                            bool never_split, bool longest_first) {
  wait_for_kernels_before();
  let_next_kernel_wait();
  int* arrivals = words + sizeof(PlanHeader) / 4;
  int4* plan_entries = reinterpret_cast<int4*>(words + bounds.entries());
  __shared__ Near near;
  __shared__ PlanHeader header;
  int4* entries = Near::holds_entries(bounds) ? near.entries : plan_entries;
  int* prefix = Near::holds_entries(bounds) ? near.prefix : words + bounds.prefix();
  int* offsets = Near::holds_sequences(lengths) ? near.offsets : words + bounds.offsets();
  int* order = words + bounds.order();
  for (int i = threadIdx.x; i < bounds.blocks; i += kPlanThreads) arrivals[i] = 0;
  const bool listed = any_listed(lengths, whole);
  order_sequences(lengths, order, longest_first, near);

  int num_entries = 0, most_tiles = 0;
  bool one_each = false;  // one tile of every sequence, as in a decode step
  for (int first = 0; first < lengths.planned(); first += kPlanThreads) {
    int place = first + threadIdx.x, m_tiles = 0;
    if (place < lengths.planned()) {
      m_tiles = tiles_of(max(sequence_at(place, lengths, order, near).seqlen_q, 0), packing);
      most_tiles = max(most_tiles, m_tiles);
    }
    if (lengths.planned() <= kNear) {
      one_each = __syncthreads_and(m_tiles == 1 || place >= lengths.planned());
      if (one_each) {
        num_entries = lengths.planned();
        break;
      }
    }
    int total, before = block_exclusive_sum(m_tiles, total);
    if (place < lengths.planned()) offsets[place] = num_entries + before;
    num_entries += total;
  }
  // The host sized the plan from the shapes; lengths that exceed them are the caller's error and must not write past
  // it.
  num_entries = min(num_entries, bounds.max_entries);
  if (threadIdx.x == 0) offsets[lengths.planned()] = num_entries;
  __syncthreads();

  // Under a causal mask items are half as long as the longest on average: so many heads have work for all workers
  // while the longest item runs.
  const bool masked = lengths.window_left >= 0 || lengths.window_right >= 0;
  int most[] = {most_tiles};
  if (!one_each) block_max(most);
  int last_heads = min(masked ? 2 * bounds.num_workers / max(most[0], 1) + 1 : 1, packing.head_tiles);
  const int first_of_last = num_entries - (bounds.num_workers + last_heads - 1) / last_heads;

  int total_weight = 0;
  int longest[] = {0, -INT_MAX, 0};  // of all, of their negatives, of the last
  for (int first = 0; first < num_entries; first += kPlanThreads) {
    int e = first + threadIdx.x, weight = 0;
    if (e < num_entries) {
      int lo = one_each ? e : 0, hi = one_each ? e : lengths.planned();  // the last place that begins at or before e
      while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        (offsets[mid] <= e ? lo : hi) = mid;
      }
      const Sequence seq = sequence_at(lo, lengths, order, near);
      // Under a causal mask the last queries see the most keys: first come the longest.
      int m_tile = one_each ? 0 : tiles_of(seq.seqlen_q, packing) - 1 - (e - offsets[lo]);
      int first_token = m_tile * packing.tokens_per_tile;
      int last_token = min(first_token + packing.tokens_per_tile, seq.seqlen_q) - 1;
      const int first_key = seq.first_key(lengths, first_token);
      int n_begin = first_key == 0 ? 0 : first_key / tile.block_n;
      int n_end = (seq.end_key(lengths, last_token) + tile.block_n - 1) / tile.block_n;
      int count = max(0, n_end - n_begin);
      const int4 entry = make_int4(longest_first ? order[lo] : lo, m_tile, n_begin, count);
      entries[e] = entry;
      plan_entries[e] = entry;
      weight = max(1, count);  // rows that see no key still have zeros to write
    }
    int total, before = block_exclusive_sum(weight, total);
    if (e < num_entries) prefix[e] = words[bounds.prefix() + e] = total_weight + before;
    total_weight += total;
    if (e >= num_entries) continue;
    longest[0] = max(longest[0], weight);
    longest[1] = max(longest[1], -weight);
    if (e >= first_of_last) longest[2] = max(longest[2], weight);
  }

  block_max(longest);
  Items items{num_entries * packing.head_tiles,    0, longest[0], -longest[1], longest[2],
              num_entries >= 4 * lengths.planned()};
  if (threadIdx.x == 0) {
    prefix[num_entries] = words[bounds.prefix() + num_entries] = total_weight;
    items.total = int64_t{total_weight} * packing.head_tiles;
    const int streamed = never_split ? 0 : streamed_items(items, bounds.num_workers, tile);
    const int heads = streamed / max(num_entries, 1), entries_left = streamed - heads * num_entries;
    // Tiles of few rows are bound by memory, where the heads of a token are neighbours. Of others one head's parts find
    // its keys in L2.
    const bool few_rows = tile.block_m == kRowsPerWarpgroup;
    header.columns = few_rows ? Columns::of(packing.head_tiles) : 1;
    header.streamed = quotient(int64_t{heads} * total_weight + prefix[entries_left], header.columns);
    const int runs = Columns(header.columns, bounds.num_workers).runs;
    header.run = quotient(header.streamed + runs - 1, runs);
    header.num_entries = num_entries;
    header.num_items = items.count;
    header.first_whole = streamed;
    header.block_m = tile.block_m;
    header.block_n = tile.block_n;
    header.pack = packing.pack;
    header.num_workers = bounds.num_workers;
    header.entries = bounds.entries();
    header.prefix = bounds.prefix();
    header.last_heads =
        few_rows ? packing.head_tiles : max(1, min(last_heads, packing.head_tiles - heads - (entries_left > 0)));
    header.listed = listed;
    header.taken = header.finished = 0;
    *reinterpret_cast<PlanHeader*>(words) = header;
  }
  __syncthreads();
  const bool started =
      tile.block_m == kRowsPerWarpgroup && header.first_whole == header.num_items && header.streamed <= INT_MAX / 2;
  if (threadIdx.x < bounds.blocks) {
    Start& start = reinterpret_cast<Start*>(words + Plan::starts(bounds.blocks))[threadIdx.x];
    if (started && threadIdx.x < bounds.num_workers) {
      start = start_of(threadIdx.x, header, entries, prefix, lengths, packing, order, near);
    } else {
      start.valid = 0;
    }
  }
}

}  // namespace

cudaError_t launch_plan(int* words, const PlanBounds& bounds, const Lengths& lengths, const WholeSequences& whole,
                        const Packing& packing, const Tile& tile, bool never_split, cudaStream_t stream) {
  const bool longest_first = lengths.planned() > 1 && (never_split || tile.block_m > kRowsPerWarpgroup);
  return launch_dependent(plan_kernel, 1, kPlanThreads, 0, stream, 1, words, bounds, lengths, whole, packing, tile,
                          never_split, longest_first);
}

}  // namespace lite_attention::sm90

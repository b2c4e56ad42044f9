#include "sm90/plan.cuh"

#include "dependent_launch.cuh"
#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {
namespace {

constexpr int kPlanThreads = 1024;
// With this many items a worker, whole items balance within a few percent and no partial result is ever written.
constexpr int kWholeItemsPerWorker = 4;

// Exclusive sum over the block's threads; total is the same for all of them.
__device__ int block_exclusive_sum(int value, int& total) {
  __shared__ int warp_sums[kPlanThreads / 32];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + inclusive - value;
}

// Maximum over the block's threads.
__device__ int block_max(int value) {
  __shared__ int warp_max[kPlanThreads / 32];
  value = __reduce_max_sync(~0u, value);
  __syncthreads();  // the maxima of the call before have been read
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(~0u, warp_max[threadIdx.x % 32]);
}

// Sequences by falling number of keys, ties in their own order: the place of each is the number that come before it.
// Whole items balance best when long ones are taken first. Not worth its square of steps beyond one pass of the block.
__device__ void order_sequences(const Lengths& lengths, int* order, bool longest_first) {
  __shared__ int keys[kPlanThreads];
  const bool sort = longest_first && lengths.planned() <= kPlanThreads;
  if (sort) {
    if (threadIdx.x < lengths.planned()) keys[threadIdx.x] = Sequence::load(lengths, threadIdx.x).seqlen_k;
    __syncthreads();
  }
  for (int b = threadIdx.x; b < lengths.planned(); b += kPlanThreads) {
    int place = sort ? 0 : b;
    for (int other = 0; sort && other < lengths.planned(); ++other) {
      place += keys[other] > keys[b] || (keys[other] == keys[b] && other < b);
    }
    order[place] = b;
  }
  __syncthreads();
}

__global__ __launch_bounds__(kPlanThreads) void plan_kernel(int* words, PlanBounds bounds, Lengths lengths,
                                                            Packing packing, Tile tile, bool never_split,
                                                            bool longest_first) {
  wait_for_kernels_before();
  let_next_kernel_wait();
  int* arrivals = words + sizeof(PlanHeader) / 4;
  int4* entries = reinterpret_cast<int4*>(words + bounds.entries());
  int* prefix = words + bounds.prefix();
  int* offsets = words + bounds.offsets();
  int* order = words + bounds.order();
  for (int i = threadIdx.x; i < bounds.blocks; i += kPlanThreads) arrivals[i] = 0;
  order_sequences(lengths, order, longest_first);

  int num_entries = 0, most_tiles = 0;
  for (int first = 0; first < lengths.planned(); first += kPlanThreads) {
    int place = first + threadIdx.x, m_tiles = 0;
    if (place < lengths.planned()) {
      Sequence seq = Sequence::load(lengths, order[place]);
      m_tiles = (max(seq.seqlen_q, 0) + packing.tokens_per_tile - 1) / packing.tokens_per_tile;
      most_tiles = max(most_tiles, m_tiles);
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

  int total_weight = 0, longest = 0;
  for (int first = 0; first < num_entries; first += kPlanThreads) {
    int e = first + threadIdx.x, weight = 0;
    if (e < num_entries) {
      int lo = 0, hi = lengths.planned();  // the last place whose first entry is at most e
      while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        (offsets[mid] <= e ? lo : hi) = mid;
      }
      const int b = order[lo];
      Sequence seq = Sequence::load(lengths, b);
      int m_tiles = (seq.seqlen_q + packing.tokens_per_tile - 1) / packing.tokens_per_tile;
      // Under a causal mask the last queries see the most keys: first come the longest.
      int m_tile = m_tiles - 1 - (e - offsets[lo]);
      int first_token = m_tile * packing.tokens_per_tile;
      int last_token = min(first_token + packing.tokens_per_tile, seq.seqlen_q) - 1;
      int n_begin = seq.first_key(lengths, first_token) / tile.block_n;
      int n_end = (seq.end_key(lengths, last_token) + tile.block_n - 1) / tile.block_n;
      int count = max(0, n_end - n_begin);
      entries[e] = make_int4(b, m_tile, n_begin, count);
      weight = max(1, count);  // rows that see no key still have zeros to write
    }
    int total, before = block_exclusive_sum(weight, total);
    if (e < num_entries) prefix[e] = total_weight + before;
    total_weight += total;
    longest = max(longest, weight);
  }

  longest = block_max(longest);
  most_tiles = block_max(most_tiles);
  if (threadIdx.x == 0) {
    prefix[num_entries] = total_weight;
    int64_t total = int64_t{total_weight} * packing.head_tiles;
    int64_t run = (total + bounds.num_workers - 1) / bounds.num_workers;
    bool balanced = int64_t{num_entries} * packing.head_tiles >= int64_t{kWholeItemsPerWorker} * bounds.num_workers &&
                    longest <= run;
    // Under a causal mask items are half as long as the longest on average: so many heads have work for all workers
    // while the longest item runs.
    const bool masked = lengths.window_left >= 0 || lengths.window_right >= 0;
    int last_heads = masked ? 2 * bounds.num_workers / max(most_tiles, 1) + 1 : 1;
    PlanHeader& header = *reinterpret_cast<PlanHeader*>(words);
    header.total = total;
    header.run = max(run, int64_t{1});
    header.num_entries = num_entries;
    header.mode = balanced || never_split ? PlanMode::kWhole : PlanMode::kStream;
    header.block_m = tile.block_m;
    header.block_n = tile.block_n;
    header.pack = packing.pack;
    header.num_workers = bounds.num_workers;
    header.entries = bounds.entries();
    header.prefix = bounds.prefix();
    header.last_heads = min(last_heads, packing.head_tiles);
    header.taken = header.finished = 0;
  }
}

}  // namespace

cudaError_t launch_plan(int* words, const PlanBounds& bounds, const Lengths& lengths, const Packing& packing,
                        const Tile& tile, bool never_split, cudaStream_t stream) {
  const bool longest_first = lengths.planned() > 1 && (never_split || tile.block_m > kRowsPerWarpgroup);
  return launch_dependent(plan_kernel, 1, kPlanThreads, 0, stream, 1, words, bounds, lengths, packing, tile,
                          never_split, longest_first);
}

}  // namespace lite_attention::sm90

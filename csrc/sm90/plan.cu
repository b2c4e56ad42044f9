#include "sm90/plan.cuh"

#include "sm90/sequence.cuh"

namespace lite_attention::sm90 {
namespace {

constexpr int kPlanThreads = 1024;
// With this many items a block, whole items balance within a few percent and no partial result is ever written.
constexpr int kWholeItemsPerBlock = 4;

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

__global__ __launch_bounds__(kPlanThreads) void plan_kernel(int* words, PlanBounds bounds, Lengths lengths,
                                                            Packing packing, Tile tile) {
  int* arrivals = words + sizeof(PlanHeader) / 4;
  int4* entries = reinterpret_cast<int4*>(words + bounds.entries());
  int* prefix = words + bounds.prefix();
  int* offsets = words + bounds.offsets();
  for (int i = threadIdx.x; i < bounds.num_ctas; i += kPlanThreads) arrivals[i] = 0;

  int num_entries = 0;
  for (int first = 0; first < lengths.batch; first += kPlanThreads) {
    int b = first + threadIdx.x, m_tiles = 0;
    if (b < lengths.batch) {
      Sequence seq(lengths, b);
      m_tiles = (max(seq.seqlen_q, 0) + packing.tokens_per_tile - 1) / packing.tokens_per_tile;
    }
    int total, before = block_exclusive_sum(m_tiles, total);
    if (b < lengths.batch) offsets[b] = num_entries + before;
    num_entries += total;
  }
  // The host sized the plan from the shapes; lengths that exceed them are the caller's error and must not write past
  // it.
  num_entries = min(num_entries, bounds.max_entries);
  if (threadIdx.x == 0) offsets[lengths.batch] = num_entries;
  __syncthreads();

  int total_weight = 0, longest = 0;
  for (int first = 0; first < num_entries; first += kPlanThreads) {
    int e = first + threadIdx.x, weight = 0;
    if (e < num_entries) {
      int lo = 0, hi = lengths.batch;  // the last sequence whose first entry is at most e
      while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        (offsets[mid] <= e ? lo : hi) = mid;
      }
      Sequence seq(lengths, lo);
      int m_tiles = (seq.seqlen_q + packing.tokens_per_tile - 1) / packing.tokens_per_tile;
      // Under a causal mask the last queries see the most keys: first come the longest.
      int m_tile = m_tiles - 1 - (e - offsets[lo]);
      int first_token = m_tile * packing.tokens_per_tile;
      int last_token = min(first_token + packing.tokens_per_tile, seq.seqlen_q) - 1;
      int n_begin = seq.first_key(lengths, first_token) / tile.block_n;
      int n_end = (seq.end_key(lengths, last_token) + tile.block_n - 1) / tile.block_n;
      int count = max(0, n_end - n_begin);
      entries[e] = make_int4(lo, m_tile, n_begin, count);
      weight = max(1, count);  // rows that see no key still have zeros to write
    }
    int total, before = block_exclusive_sum(weight, total);
    if (e < num_entries) prefix[e] = total_weight + before;
    total_weight += total;
    longest = max(longest, weight);
  }

  longest = __reduce_max_sync(~0u, longest);
  __shared__ int warp_longest[kPlanThreads / 32];
  if (threadIdx.x % 32 == 0) warp_longest[threadIdx.x / 32] = longest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kPlanThreads / 32; ++w) longest = max(longest, warp_longest[w]);
    prefix[num_entries] = total_weight;
    int64_t total = int64_t{total_weight} * packing.head_tiles;
    int64_t run = (total + bounds.num_ctas - 1) / bounds.num_ctas;
    bool whole =
        int64_t{num_entries} * packing.head_tiles >= int64_t{kWholeItemsPerBlock} * bounds.num_ctas && longest <= run;
    PlanHeader& header = *reinterpret_cast<PlanHeader*>(words);
    header.total = total;
    header.run = max(run, int64_t{1});
    header.num_entries = num_entries;
    header.mode = whole ? PlanMode::kWhole : PlanMode::kStream;
    header.block_m = tile.block_m;
    header.block_n = tile.block_n;
    header.pack = packing.pack;
    header.num_ctas = bounds.num_ctas;
    header.entries = bounds.entries();
    header.prefix = bounds.prefix();
    header.taken = header.finished = 0;
  }
}

}  // namespace

cudaError_t launch_plan(int* words, const PlanBounds& bounds, const Lengths& lengths, const Packing& packing,
                        const Tile& tile, cudaStream_t stream) {
  plan_kernel<<<1, kPlanThreads, 0, stream>>>(words, bounds, lengths, packing, tile);
  return cudaGetLastError();
}

}  // namespace lite_attention::sm90

// Estimates the log-mass of every full page for every query: lite_attention/pages/estimate.py.
//
// The tensor cores multiply a page's codes with the queries:
//
//   q.mean       = offset * sum(q) + step * (q.code)
//   q.difference = difference_step * (q.code - 8 * sum(q))
//
// An instruction has 16 pages as its rows, 16 channels, and 8 query heads as its columns. Queries and codes are exact
// in fp16, sums are float32. What the channels' order is does not matter as long as it is the same on both sides, so a
// thread takes them as they come in its loads of a sketch.
#include <algorithm>

#include "dependent_launch.cuh"
#include "pages/codes.cuh"
#include "pages/exp2.cuh"
#include "pages/launch.h"
#include "pages/queries.cuh"
#include "pages/scope.cuh"
#include "pages/warp.cuh"
#include "pages/whole.cuh"
#include "warp_scan.cuh"

namespace lite_attention::pages {
namespace {

// Threads of a block, and blocks of a multiprocessor. What is not known yet is waited for by many warps, so nothing but
// the numbers of pages is fetched ahead, and few registers hold what a warp needs.
constexpr int kGroups = 2, kThreads = kGroups * kGroupThreads;
template <int kRounds, int kOctets>
constexpr int kBlocks = kRounds * kOctets == 1         ? 4
                        : kRounds <= 2 && kOctets == 1 ? 3
                                                       : 2;

// sums += rows x columns, of 16 pages, 16 channels, 8 columns.
__device__ void multiply(float (&sums)[4], const Rows& pages, uint2 queries) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(pages[0]), "r"(pages[1]), "r"(pages[2]), "r"(pages[3]), "r"(queries.x), "r"(queries.y));
}

// Over the lanes that have one head's pages.
__device__ float max_over_pages(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
__device__ float sum_over_pages(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// To base 2. `mean_code` and `difference_code` are the products of codes as they come, more than they should be by
// kBias of differences and kMeanBias of means.
template <int kMeanBias>
__device__ float log2_mass(const Factors& query, float4 scales, float mean_code, float difference_code) {
  constexpr float kKnee = 1.74f * kRootLog2E, kLog2Page = 4.f, kOthersShare = -0.09310940439148147f;
  const float mean = (scales.x - kMeanBias * scales.y) * query.offset + scales.y * mean_code * query.code;
  // Half the variance, and its tangent from the knee on.
  const float spread = scales.w * query.spread, low = fminf(spread, kKnee);
  const float others = low * (spread - 0.5f * low) + kOthersShare;
  const float apart = scales.z * (difference_code * query.code - (kBias + kNoDifference) * query.offset) - kLog2Page;
  return mean + fmaxf(others, apart) + log2_approximate(1.f + exp2_approximate(-fabsf(others - apart)));
}

// The tiles of 16 pages of all sequences, one after the other.
class Tiles {
 public:
  // `before` has room for one more than sequences.
  __device__ Tiles(const SelectParams& params, int* before) : before_(before) {
    __shared__ int of_warps[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int sum = 0;
    for (int first = 0; first < params.batch; first += blockDim.x) {
      const int batch = first + threadIdx.x;
      const int tiles = batch < params.batch ? (Scope(params, batch).estimated() + kTile - 1) / kTile : 0;
      const int inclusive = inclusive_sum(tiles);
      if (lane == 31) of_warps[warp] = inclusive;
      __syncthreads();
      const int of_warp = lane < warps ? of_warps[lane] : 0;
      const int of_warps_before = __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
      if (batch < params.batch) before_[batch] = sum + of_warps_before + inclusive - tiles;
      sum += __reduce_add_sync(~0u, of_warp);
      __syncthreads();
    }
    if (threadIdx.x == 0) before_[params.batch] = sum;
    __syncthreads();
    total_ = sum;
  }

  __device__ int total() const { return total_; }
  __device__ int begin(int batch) const { return before_[batch]; }
  __device__ int end(int batch) const { return before_[batch + 1]; }
  // The last sequence of `batch` that begins at or before the tile.
  __device__ int find(int tile, int batch) const {
    int found = 0, above = batch;
    while (above - found > 1) {
      const int middle = (found + above) / 2;
      (before_[middle] <= tile ? found : above) = middle;
    }
    return found;
  }

 private:
  int* before_;
  int total_;
};

// A group's pages of one sequence and KV head, whose tiles its warps take in turn.
template <int kBits, int kRounds, int kOctets>
class Scorer {
 public:
  // `waits` says that the kernel before has still to be waited for; whoever does it says so.
  __device__ Scorer(const SelectParams& params, Queries<kRounds, kOctets>& queries, int batch, int head, bool& waits)
      : params_(params),
        waits_(waits),
        queries_(queries),
        scope_(params, batch),
        batch_(batch),
        head_(head),
        full_(scope_.estimated()),
        quads_(scope_.q_len * params.quads()),
        of_list_((int64_t{batch} * params.sketches.heads_k + head) * params.max_seqlen_q * params.quads()) {}

  __device__ void run(int first_tile, int end_tile) {
    for (int first = 0; first < quads_; first += kOctets * kColumnQuads) run(first_tile, end_tile, first);
  }

 private:
  static constexpr int kStep = kGroupWarps * kTile;

  __device__ int lane() const { return threadIdx.x % 32; }

  // Numbers in the cache of this thread's two pages among 16. One past the end is the last one again; one that the
  // cache hasn't is its last page.
  __device__ void find(int (&numbers)[2], int page0) const {
    const int* table = params_.block_table + batch_ * params_.block_table_stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int number = __ldg(table + min(page0 + lane() / 4 + 8 * i, full_ - 1));
      numbers[i] = min(max(number, 0), params_.sketches.num_blocks - 1);
    }
  }

  __device__ uint2 columns(int octet, int round, int part) const {
    const int channel = 64 * round + 16 * (threadIdx.x % 4) + 4 * part;
    return *reinterpret_cast<const uint2*>(queries_.q[octet * kColumns + lane() / 4] + channel);
  }

  // The quads of queries from `first` on, as many as there are octets for.
  __device__ void run(int first_tile, int end_tile, int first) {
    const int first_page = (first_tile + threadIdx.x / 32 % kGroupWarps) * kTile, end_page = end_tile * kTile;
    int numbers[2];
    find(numbers, first_page);
    fill<kBits>(queries_, params_, scope_, batch_, head_, first);
    if (waits_) wait_for_kernels_before();
    waits_ = false;
    for (int page0 = first_page; page0 < end_page; page0 += kStep) {
      Codes<kBits, kRounds> codes;
      codes.load(params_.sketches, numbers, head_);
      find(numbers, page0 + kStep);
      float mean[kOctets][4] = {}, difference[kOctets][4] = {};
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          Rows means, differences;
          codes.mean_rows(round, part, means);
          codes.difference_rows(round, part, differences);
#pragma unroll
          for (int octet = 0; octet < kOctets; ++octet) {
            const uint2 q = columns(octet, round, part);
            multiply(mean[octet], means, q);
            multiply(difference[octet], differences, q);
          }
        }
      }
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) {
        const int column = octet * kColumns + lane() % 4 * 2;
        float x[2][2];  // pages, heads
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Factors factors = queries_.factors[column + j];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = 2 * i + j;
            x[i][j] = log2_mass<Codes<kBits, kRounds>::kMeanBias>(factors, codes.scales[i], mean[octet][at],
                                                                  difference[octet][at]);
          }
        }
        write(x, page0, first + column / kHeads, queries_.counted[column / kHeads]);
      }
    }
  }

  // The log-masses of a thread's two pages for two heads beside each other of a quad, and what the tile has of them.
  __device__ void write(const float (&x)[2][2], int page0, int quad, int counted) const {
    const bool there = quad < quads_;
    const int64_t at = of_list_ + quad;
    float* scores = reinterpret_cast<float*>(params_.scores + at * params_.max_blocks) + lane() % 2 * 2;
    float most[2] = {kLowest, kLowest}, mass[2];
    float seen[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int page = page0 + lane() / 4 + 8 * i;
      if (there && page < full_) *reinterpret_cast<float2*>(scores + page * kHeads) = make_float2(x[i][0], x[i][1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        seen[i][j] = page < counted && finite(x[i][j]) ? x[i][j] : -INFINITY;
        most[j] = fmaxf(most[j], seen[i][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      most[j] = max_over_pages(most[j]);
      mass[j] = sum_over_pages(exp2_approximate(seen[0][j] - most[j]) + exp2_approximate(seen[1][j] - most[j]));
    }
    if (lane() < 4 && there) {
      float2* tile = params_.tiles + (at * params_.tiles_of_list() + page0 / kTile) * kHeads + lane() % 2 * 2;
      *reinterpret_cast<float4*>(tile) = make_float4(most[0], mass[0], most[1], mass[1]);
    }
  }

  const SelectParams& params_;
  bool& waits_;
  Queries<kRounds, kOctets>& queries_;
  const Scope scope_;
  const int batch_, head_;
  const int full_;         // pages
  const int quads_;        // of all query tokens
  const int64_t of_list_;  // the list's first quad
};

// Those of this block's tiles. Tiles are dealt out as runs: a group of warps has one head of one run. Groups beside
// each other have the heads of the same pages, whose sketches are neighbours.
template <int kBits, int kRounds, int kOctets>
__device__ void score(const SelectParams& params, Queries<kRounds, kOctets>* queries, bool& waits) {
  const Tiles tiles(params, reinterpret_cast<int*>(queries + kGroups));

  const int group = threadIdx.x / kGroupThreads, place = blockIdx.x * kGroups + group;
  const int heads = params.sketches.heads_k, runs = gridDim.x * kGroups / heads;
  const int head = place % heads, run = place / heads;
  if (run >= runs) return;
  const int length = (tiles.total() + runs - 1) / runs, end = min(tiles.total(), (run + 1) * length);
  int tile = run * length;
  if (tile >= end) return;
  int batch = tiles.find(tile, params.batch);
  while (tile < end) {
    while (tiles.end(batch) <= tile) ++batch;
    const int stop = min(end, tiles.end(batch)), before = tiles.begin(batch);
    Scorer<kBits, kRounds, kOctets>(params, queries[group], batch, head, waits).run(tile - before, stop - before);
    tile = stop;
  }
}

template <int kBits, int kRounds, int kOctets>
__global__ __launch_bounds__(kThreads,
                             kBlocks<kRounds, kOctets>) void score_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 raw_smem[];
  bool waits = params.after_sketch;
  if (!waits) wait_for_kernels_before();
  let_next_kernel_wait();
  if (step_without_lists(params)) {
    count_all(params, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  } else {
    score<kBits>(params, reinterpret_cast<Queries<kRounds, kOctets>*>(raw_smem), waits);
  }
  if (waits) end_after_kernels_before();
}

template <int kBits, int kRounds, int kOctets>
cudaError_t launch(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  auto* kernel = &score_kernel<kBits, kRounds, kOctets>;
  const int smem = kGroups * int(sizeof(Queries<kRounds, kOctets>)) + 4 * (params.batch + 1);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) return error;
  int blocks = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, smem);
  if (error != cudaSuccess) return error;
  // Every head has a group, though there were more heads than groups at one time.
  const int least = (params.sketches.heads_k + kGroups - 1) / kGroups;
  return launch_dependent(kernel, std::max(blocks * multiprocessors, least), kThreads, smem, stream, 1, params);
}

template <int kBits, int kRounds>
cudaError_t launch_octets(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  return params.max_seqlen_q * params.quads() <= kColumnQuads
             ? launch<kBits, kRounds, 1>(params, multiprocessors, stream)
             : launch<kBits, kRounds, 2>(params, multiprocessors, stream);
}

template <int kBits>
cudaError_t launch_rounds(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  switch ((params.sketches.head_dim + 63) / 64) {
    case 1:
      return launch_octets<kBits, 1>(params, multiprocessors, stream);
    case 2:
      return launch_octets<kBits, 2>(params, multiprocessors, stream);
    case 3:
      return launch_octets<kBits, 3>(params, multiprocessors, stream);
    default:
      return launch_octets<kBits, 4>(params, multiprocessors, stream);
  }
}

}  // namespace

cudaError_t launch_score(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  return params.sketches.bits == 8 ? launch_rounds<8>(params, multiprocessors, stream)
                                   : launch_rounds<12>(params, multiprocessors, stream);
}

}  // namespace lite_attention::pages

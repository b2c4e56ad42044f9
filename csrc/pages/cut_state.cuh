// How the blocks that make lists share their work, and what they keep in shared memory (cut.cu).
#pragma once

#include "pages/launch.h"
#include "pages/warp.cuh"

namespace lite_attention::pages {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 512;
constexpr int kFew = 256;  // pages that are compared with each other

template <class Body>
__device__ void for_threads(int count, const Body& body) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) body(i);
}

template <class Body>
__device__ void for_warps(int count, const Body& body) {
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < count; i += kWarps) body(i);
}

template <class Body>
__device__ void for_heads(const Body& body) {
#pragma unroll
  for (int i = 0; i < kHeads; ++i) body(i);
}

__device__ inline float& at(float4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

__device__ inline uint32_t inclusive_sum(uint32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, x, step);
    if (threadIdx.x % 32 >= step) x += other;
  }
  return x;
}

// Mass as a factor on exp2 of the largest log-mass.
struct Mass {
  float most = kLowest, sum = 0.f;

  __device__ void add(float2 other) {
    const float above = fmaxf(most, other.x);
    sum = sum * exp2f(most - above) + other.y * exp2f(other.x - above);
    most = above;
  }
  __device__ float2 of_warp() const {
    const float above = warp_max(most);
    return make_float2(above, warp_sum(sum * exp2f(most - above)));
  }
};

// Pages of a block of the cluster: full words of the list's bits.
__host__ __device__ inline int words_of_block(int words, int cluster) { return (words + cluster - 1) / cluster; }

// Where the search stands. The first block of a cluster decides, and the others look it up.
struct Search {
  uint32_t least, most;  // of the block's ranks that may be dropped
  uint32_t low, high;    // the present range of ranks
  uint32_t cut;
  int shift;      // of the range's bins
  int first_bin;  // 1 where there is a bin more, for all that is below the range
  int over;       // the first bin at whose end some head has dropped too much
  int found;      // pages of the range that are few
  bool done;
};

// Dynamic shared memory.
struct Shared {
  float4* shares;       // where there is room for them: see Cut::shares_
  float2* partial;      // (quads * kHeads, kWarps), masses by warp
  float2* factors;      // (quads * kHeads), the largest log-mass, and one over the sum of masses beside it
  uint32_t* bins;       // (group, kBins) of this block, in the first one then of all
  uint32_t* base;       // (group), dropped below the present range
  uint32_t* few_ranks;  // (kFew)
  uint32_t* few_units;  // (kFew, group)
  uint32_t* bits;       // (words of the block)
  int* offsets;         // (kThreads), of words in the list
  int* listed;          // pages of this block
  int room;             // bytes for shares and ranks

  __device__ Shared(const SelectParams& params, int words, uint4* smem) {
    const int heads = params.quads() * kHeads, group = params.group;
    room = params.cut_room;
    shares = reinterpret_cast<float4*>(smem);
    partial = reinterpret_cast<float2*>(shares + room / sizeof(float4));
    factors = partial + heads * kWarps;
    bins = reinterpret_cast<uint32_t*>(factors + heads);
    base = bins + group * kBins;
    few_ranks = base + group;
    few_units = few_ranks + kFew;
    bits = few_units + group * kFew;
    offsets = reinterpret_cast<int*>(bits + words);
    listed = offsets + kThreads;
  }
  // Without the room for shares.
  static int bytes(const SelectParams& params, int words) {
    return 4 * (2 * params.quads() * kHeads * (kWarps + 1) + params.group * (kBins + 1 + kFew) + kFew + words +
                kThreads + 1);
  }
};

}  // namespace lite_attention::pages

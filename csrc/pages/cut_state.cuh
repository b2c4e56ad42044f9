// How the blocks that make lists share their work, and what they keep in shared memory (cut.cu).
#pragma once

#include "pages/exp2.cuh"
#include "pages/launch.h"
#include "pages/warp.cuh"
#include "warp_scan.cuh"

namespace lite_attention::pages {

constexpr int kThreads = 512, kWarps = kThreads / 32, kLogWarps = 4;
static_assert(kWarps == 1 << kLogWarps);
constexpr int kMaxCluster = 8;
constexpr int kBins = 512;
constexpr int kFew = 256;  // pages that are compared with each other
static_assert(kBins == 4 * 4 * 32, "a lane has four bins of each quarter");

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

// Of a power of two.
__device__ inline int log2_of(int x) { return 31 - __clz(x); }

// Mass as a factor on exp2 of the largest log-mass.
struct Mass {
  float most = kLowest, sum = 0.f;

  template <int kCount>
  __device__ void add(const float2 (&others)[kCount]) {
    float above = most;
#pragma unroll
    for (float2 other : others) above = fmaxf(above, other.x);
    sum *= exp2_approximate(most - above);
#pragma unroll
    for (float2 other : others) sum += other.y * exp2_approximate(other.x - above);
    most = above;
  }
  // Over every kApart-th lane.
  template <int kApart>
  __device__ void add_lanes() {
    float above = most;
#pragma unroll
    for (int step = kApart; step < 32; step *= 2) above = fmaxf(above, __shfl_xor_sync(~0u, above, step));
    sum *= exp2_approximate(most - above);
#pragma unroll
    for (int step = kApart; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    most = above;
  }
};

// Pages of a block of the cluster: full words of the list's bits.
__host__ __device__ inline int words_of_block(int words, int cluster) { return (words + cluster - 1) / cluster; }

// What the blocks of a cluster send each other (cut.cu).
enum Message { kParts, kSums, kFound, kListed, kMessages };

// What the blocks of a cluster tell each other, and what the threads of one do.
struct Search {
  uint64_t arrivals[kMessages];
  int over;                 // the first bin at whose end some head has dropped too much
  uint32_t cut;             // the least rank of the few for which some head has
  int found_here;           // pages of this block in the range
  int found[kMaxCluster];   // of each block
  int listed[kMaxCluster];  // pages of each block
  int of_warps[kWarps];
};

// Dynamic shared memory.
struct Shared {
  float4* shares;        // where there is room for them: see Cut::shares_
  float4* factors;       // (quads), for each of four heads log2 of the mass of all pages
  float2* partial;       // (quads * kHeads, kWarps), masses by warp
  uint32_t* bins;        // (group, kBins) of this block
  uint32_t* parts;       // (blocks, group * kBins / blocks), what all blocks have in this block's part of the bins
  uint32_t* sums;        // (group, kBins) of all blocks
  uint32_t* own_units;   // (kFew / blocks, group), of the few pages of this block
  uint32_t* own_ranks;   // (kFew / blocks)
  uint32_t* sent_units;  // (blocks, kFew / blocks, group), as they come from all blocks
  uint32_t* sent_ranks;  // (blocks, kFew / blocks)
  uint32_t* few_units;   // (kFew, group), of the few pages of all blocks
  uint32_t* few_ranks;   // (kFew)
  uint32_t* base;        // (group), dropped below the present range
  uint32_t* bits;        // (words of the block)
  int* offsets;          // (words of the block), in the block's part of the list
  int room;              // bytes for shares and ranks

  __device__ Shared(const SelectParams& params, int words, int blocks, uint4* smem) {
    const int heads = params.quads() * kHeads, group = params.group;
    room = params.cut_room;
    shares = reinterpret_cast<float4*>(smem);
    factors = shares + room / sizeof(float4);
    partial = reinterpret_cast<float2*>(factors + params.quads());
    bins = reinterpret_cast<uint32_t*>(partial + heads * kWarps);
    const bool many = blocks > 1;
    parts = many ? bins + group * kBins : bins;
    sums = many ? parts + group * kBins : bins;
    own_units = sums + group * kBins;
    own_ranks = own_units + group * (kFew / blocks);
    sent_units = many ? own_ranks + kFew / blocks : own_units;
    sent_ranks = sent_units + group * kFew;
    few_units = many ? sent_ranks + kFew : own_units;
    few_ranks = few_units + group * kFew;
    base = few_ranks + kFew;
    bits = base + group;
    offsets = reinterpret_cast<int*>(bits + words);
  }
  // Without the room for shares.
  static int bytes(const SelectParams& params, int words, int blocks) {
    const int few = (params.group + 1) * kFew, bins = params.group * kBins;
    const int counts = blocks > 1 ? 3 * bins + few / blocks + 2 * few : bins + few;
    return 4 * (params.quads() * kHeads * (1 + 2 * kWarps) + counts + params.group + 2 * words);
  }
};

}  // namespace lite_attention::pages

// The queries of one sequence and KV head, as the columns of matrix products with the codes of sketches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "pages/format.cuh"
#include "pages/launch.h"
#include "pages/scope.cuh"
#include "pages/warp.cuh"

namespace lite_attention::pages {

constexpr int kGroupWarps = 4;  // that have one KV head of the same pages: a group
constexpr int kGroupThreads = 32 * kGroupWarps;
constexpr int kColumns = 8;  // of a product: two quads of query heads
constexpr int kColumnQuads = kColumns / kHeads;
// The largest of a query's numbers in fp16 lies just below 2 to this: far from where fp16 ends.
constexpr int kExponent = 13;

// Spreads are for log-masses to base 2; theirs has the root of ALIGNED in lite_attention/pages/estimate.py.
constexpr float kRootLog2E = 1.2011224087864498f, kSpread = 2.f * kRootLog2E;

// What a query adds to its products with codes, for log-masses to base 2.
struct alignas(16) Factors {
  float offset, code;  // on an offset of all channels, and on step * (q.code)
  float spread;        // on the deviation
};

template <int kRounds, int kOctets>
struct Queries {
  static constexpr int kChannels = 64 * kRounds, kAll = kColumns * kOctets;
  // Four more than the channels: what lanes read at one time lies in different banks.
  using Numbers = __half[kAll][kChannels + 4];

  Numbers q;  // in the order of a format's codes, under a power of two, which makes a 16-bit q exact
  Factors factors[kAll];
  int counted[kAll / kHeads];  // pages that a quad's token sees all of
};

__device__ inline float load_query(const SelectParams& params, int64_t at) {
  return params.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(params.q)[at])
                         : __half2float(static_cast<const __half*>(params.q)[at]);
}

// 2^n for which the largest of x is below 2^kExponent; 1 where there is none.
__device__ inline float power_below(float largest) {
  if (!(largest > 0.f) || !isfinite(largest)) return 1.f;
  return ldexpf(1.f, max(-126, min(126, kExponent - 1 - ilogbf(largest))));
}

__device__ inline void sync_group() {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + int(threadIdx.x) / kGroupThreads), "n"(kGroupThreads) : "memory");
}

// Fills `queries` with quads of heads, token by token, from `first` on; what the group or the sequence hasn't is zeros.
// A warp has every fourth column.
template <int kBits, int kRounds, int kOctets>
__device__ void fill(Queries<kRounds, kOctets>& queries, const SelectParams& params, const Scope& scope, int batch,
                     int head, int first) {
  using Filled = Queries<kRounds, kOctets>;
  constexpr int kLaneChannels = Filled::kChannels / 32, kOwn = Filled::kAll / kGroupWarps;
  static_assert(kGroupWarps == kHeads, "a warp has the same head of every quad");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kGroupWarps;
  float x[kOwn][kLaneChannels];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int token = (first + own) / params.quads(), in_group = (first + own) % params.quads() * kHeads + warp;
    const bool there = token < scope.q_len && in_group < params.group;
    const int64_t at = (int64_t{scope.q_begin} + token) * params.q_token_stride +
                       (int64_t{head} * params.group + in_group) * params.q_head_stride;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const int channel = k * 32 + lane;
      x[own][k] = there && channel < params.sketches.head_dim ? load_query(params, at + channel) : 0.f;
    }
  }
  const Descale& descale = params.k_descale;
  const float scale =
      params.softmax_scale *
      (descale.factors ? descale.factors[batch * descale.batch_stride + head * descale.head_stride] : 1.f);
  sync_group();  // nobody reads the queries of before
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int column = own * kHeads + warp;
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) largest = fmaxf(largest, fabsf(x[own][k]));
    largest = warp_max(largest);
    const float power = power_below(largest);
    float sum = 0.f, sum_of_squares = 0.f;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const int channel = k * 32 + lane;
      const __half number = __float2half_rn(x[own][k] * power);
      const float exact = __half2float(number);
      queries.q[column][Format<kBits>::place(channel)] = number;
      sum += exact;
      sum_of_squares += exact * exact;
    }
    sum = warp_sum(sum);
    sum_of_squares = warp_sum(sum_of_squares);
    if (lane == 0) {
      queries.counted[own] = scope.counted((first + own) / params.quads());
      const float code = kLog2E * scale / power;
      queries.factors[column] = {code * sum, code, kSpread * fabsf(scale) / power * sqrtf(sum_of_squares)};
    }
  }
  sync_group();
}

}  // namespace lite_attention::pages

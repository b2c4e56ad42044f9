// Estimates the log-mass of every full page for every query: lite_attention/pages/estimate.py.
//
// A page's codes become small integers in fp16, which are exact, and the tensor cores multiply them with the queries.
// Those are 16-bit numbers under a power of two, and their squares are two such numbers each, so that the sums have the
// precision of float32:
//
//   q.mean     = offset * sum(q) + step * (q.code)
//   variance   = offset^2 * sum(q^2) + 2 * offset * step * (q^2.code) + step^2 * (q^2.code^2)
//
// An instruction has 16 pages as its rows and 16 channels; its 8 columns are 4 queries, each a high and a low part.
// What the channels' order is does not matter as long as it is the same on both sides, so a thread takes them as they
// come in its 16-byte loads of a sketch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "dependent_launch.cuh"
#include "pages/launch.h"
#include "pages/layout.cuh"
#include "pages/scope.cuh"
#include "pages/warp.cuh"

namespace lite_attention::pages {
namespace {

constexpr int kWarps = 4;  // that have one KV head of the same pages: a group
constexpr int kGroupThreads = 32 * kWarps;
// Groups of a block, for heads beside each other: as many as registers allow.
template <int kRounds, int kTiles>
constexpr int kGroups = kRounds <= 2 && kTiles == 1 ? 4 : 2;
constexpr float kKnee = 1.77f, kBeyond = 1.566f;
// The largest of a query's numbers in fp16, and of their squares, lie just below 2 to this: far from where fp16 ends.
constexpr int kExponent = 13;

__device__ __half2 as_half2(uint32_t x) { return reinterpret_cast<const __half2&>(x); }
__device__ uint32_t as_word(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }

// 0x6400 | n is 1024 + n in fp16.
__device__ uint32_t less_1024(uint32_t x) { return as_word(__hsub2(as_half2(x), as_half2(0x64006400u))); }

// Bytes 0 and 1, or 2 and 3, of a word of mean codes.
template <int kHalf>
__device__ uint32_t bytes(uint32_t word) {
  return less_1024(__byte_perm(word, 0x64646464u, kHalf == 0 ? 0x4140 : 0x4342));
}
// Nibbles n and n + 4 of a word of deviation codes.
template <int kNibble>
__device__ uint32_t nibbles(uint32_t word) {
  return less_1024((word >> 4 * kNibble & 0x000f000fu) | 0x64006400u);
}
__device__ uint32_t squared(uint32_t x) { return as_word(__hmul2(as_half2(x), as_half2(x))); }

// sums += rows x columns, of 16 pages, 16 channels, 8 columns.
__device__ void multiply(float (&sums)[4], const uint32_t (&pages)[4], uint2 queries) {
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

// What a row of queries adds to the products with codes.
struct Row {
  float sum, step;             // of q.mean: factors on the offset, and on step * (q.code)
  float squares, square_step;  // of the variance
};

// The queries of one sequence and KV head as a warp's instructions want them.
template <int kRounds, int kTiles>
struct Queries {
  static constexpr int kChannels = 64 * kRounds, kDeviationRounds = (kRounds + 1) / 2;
  uint2 q[kTiles][kRounds][4][32];  // by 16-byte round, instruction and lane
  uint2 squares[kTiles][kDeviationRounds][8][32];
  Row rows[kTiles * kHeads];
  // Scratch: high and low part of a head's q and of its squares. Four more than the channels: what the lanes read at
  // one time lies in different banks.
  struct Numbers {
    __half q[2][kChannels + 4], squares[2][kChannels + 4];
  } numbers[kHeads];
};

__device__ float load(const SelectParams& params, int64_t at) {
  return params.bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(params.q)[at])
                         : __half2float(static_cast<const __half*>(params.q)[at]);
}

// 2^n for which the largest of x is below 2^kExponent; 1 where there is none.
__device__ float power_below(float largest) {
  if (!(largest > 0.f) || !isfinite(largest)) return 1.f;
  return ldexpf(1.f, max(-126, min(126, kExponent - 1 - ilogbf(largest))));
}

__device__ void split(float x, __half& high, __half& low) {
  high = __float2half_rn(x);
  low = __float2half_rn(x - __half2float(high));
}

__device__ void sync_group() {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + int(threadIdx.x) / kGroupThreads), "n"(kGroupThreads) : "memory");
}

// Fills `queries` with kTiles quads of heads, token by token, from `first` on; what the group or the sequence hasn't is
// zeros. A warp has one head of each quad, then one instruction of each round.
template <int kRounds, int kTiles>
__device__ void fill(Queries<kRounds, kTiles>& queries, const SelectParams& params, const Scope& scope, int batch,
                     int head, int first) {
  static_assert(kWarps == kHeads && kWarps == 4, "a warp has one head, and one of four instructions");
  constexpr int kChannels = Queries<kRounds, kTiles>::kChannels, kLaneChannels = kChannels / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps, column = lane / 4, quad = lane % 4;
  const int quads = params.quads();
  const Descale& descale = params.k_descale;
  const float scale =
      params.softmax_scale *
      (descale.factors ? descale.factors[batch * descale.batch_stride + head * descale.head_stride] : 1.f);
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = (first + tile) / quads, in_group = (first + tile - token * quads) * kHeads + warp;
    const bool there = token < scope.q_len && in_group < params.group;
    const int64_t at = (int64_t{scope.q_begin} + token) * params.q_token_stride +
                       (int64_t{head} * params.group + in_group) * params.q_head_stride;
    float x[kLaneChannels], largest = 0.f, sum = 0.f, squares = 0.f;
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      const int channel = k * 32 + lane;
      x[k] = there && channel < params.sketches.head_dim ? load(params, at + channel) : 0.f;
      largest = fmaxf(largest, fabsf(x[k]));
      sum += x[k];
      squares += x[k] * x[k];
    }
    largest = warp_max(largest);
    const float power = power_below(largest), square_power = power_below(largest * largest);
    sum = warp_sum(sum);
    squares = warp_sum(squares);
    auto& mine = queries.numbers[warp];
#pragma unroll
    for (int k = 0; k < kLaneChannels; ++k) {
      split(x[k] * power, mine.q[0][k * 32 + lane], mine.q[1][k * 32 + lane]);
      split(x[k] * x[k] * square_power, mine.squares[0][k * 32 + lane], mine.squares[1][k * 32 + lane]);
    }
    sync_group();  // numbers are there, and nobody reads the queries of before
    if (lane == 0) {
      queries.rows[tile * kHeads + warp] = {scale * sum, scale / power, scale * scale * squares,
                                            scale * scale / square_power};
    }
    const auto& numbers = queries.numbers[column / 2];
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      queries.q[tile][round][warp][lane] =
          *reinterpret_cast<const uint2*>(numbers.q[column % 2] + 16 * (quad + 4 * round) + 4 * warp);
    }
#pragma unroll
    for (int round = 0; round < Queries<kRounds, kTiles>::kDeviationRounds; ++round) {
      const int channel = 32 * (quad + 4 * round) + 8 * warp;
      // Sections end at a multiple of 64 channels, rounds of deviations at one of 128.
      const uint2* from = reinterpret_cast<const uint2*>(numbers.squares[column % 2] + min(channel, kChannels - 8));
      const uint2 low = channel < kChannels ? from[0] : make_uint2(0, 0);   // channels 0 to 3 of 8
      const uint2 high = channel < kChannels ? from[1] : make_uint2(0, 0);  // and 4 to 7
      auto* to = queries.squares[tile][round];
      to[2 * warp][lane] = make_uint2(__byte_perm(low.x, high.x, 0x5410), __byte_perm(low.x, high.x, 0x7632));
      to[2 * warp + 1][lane] = make_uint2(__byte_perm(low.y, high.y, 0x5410), __byte_perm(low.y, high.y, 0x7632));
    }
    sync_group();
  }
}

// The codes of this thread's two pages, 8 apart among the 16 of an instruction.
template <int kRounds>
struct Codes {
  static constexpr int kDeviationRounds = (kRounds + 1) / 2;
  float4 scales[2];
  uint4 means[2][kRounds], deviations[2][kDeviationRounds];

  __device__ void load(const SelectParams& params, const int (&pages)[2], int head) {
    const int quad = threadIdx.x % 4, head_dim = params.sketches.head_dim;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* sketch =
          params.sketches.data + pages[i] * params.sketches.page_stride + head * params.sketches.head_stride;
      scales[i] = __ldg(reinterpret_cast<const float4*>(sketch));
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int at = 16 * (quad + 4 * round);
        means[i][round] =
            at < head_dim ? __ldg(reinterpret_cast<const uint4*>(sketch + kHeader + at)) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int round = 0; round < kDeviationRounds; ++round) {
        const int at = 16 * (quad + 4 * round);
        deviations[i][round] = 2 * at < head_dim
                                   ? __ldg(reinterpret_cast<const uint4*>(sketch + deviations_at(head_dim) + at))
                                   : make_uint4(0, 0, 0, 0);
      }
    }
  }
};

__device__ uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

__device__ float log_mass(const Row& row, float4 scales, float code, float deviation, float square) {
  const float linear = scales.x * row.sum + scales.y * row.step * code;
  const float variance =
      scales.z * scales.z * row.squares + scales.w * row.square_step * (2.f * scales.z * deviation + scales.w * square);
  const float spread = sqrtf(variance);
  return linear + (spread < kKnee ? 0.5f * variance : kKnee * spread - kBeyond);
}

// The tiles of 16 pages of all sequences, one after the other, are dealt out as runs: a group of warps has one head of
// one run, whose tiles its warps take in turn.
template <int kRounds, int kTiles>
__global__ __launch_bounds__(kGroups<kRounds, kTiles>* kGroupThreads) void score_kernel(
    const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 raw_smem[];
  auto* all_queries = reinterpret_cast<Queries<kRounds, kTiles>*>(raw_smem);
  int* tiles_before =
      reinterpret_cast<int*>(all_queries + kGroups<kRounds, kTiles>);  // (batch + 1), before each sequence
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps, group = threadIdx.x / kGroupThreads;
  const int heads = params.sketches.heads_k;
  auto& queries = all_queries[group];

  wait_for_kernels_before();
  let_next_kernel_wait();
  if (threadIdx.x < 32) {
    int sum = 0;
    for (int first = 0; first < params.batch; first += 32) {
      const int batch = first + lane;
      int tiles = batch < params.batch ? (Scope(params, batch).estimated() + kTile - 1) / kTile : 0;
      int inclusive = tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, inclusive, step);
        if (lane >= step) inclusive += other;
      }
      if (batch < params.batch) tiles_before[batch] = sum + inclusive - tiles;
      sum += __shfl_sync(~0u, inclusive, 31);
    }
    if (lane == 0) tiles_before[params.batch] = sum;
  }
  __syncthreads();

  // Groups beside each other have the heads of the same pages, whose sketches are neighbours.
  const int place = blockIdx.x * kGroups<kRounds, kTiles> + group;
  const int runs = gridDim.x * kGroups<kRounds, kTiles> / heads;
  const int head = place % heads, run = place / heads;
  const int total = tiles_before[params.batch];
  if (run >= runs) return;
  const int length = (total + runs - 1) / runs, end = min(total, (run + 1) * length);
  int tile = run * length;
  if (tile >= end) return;
  int batch = 0, above = params.batch;  // the last sequence that begins at or before the tile and has any
  while (above - batch > 1) {
    const int middle = (batch + above) / 2;
    (tiles_before[middle] <= tile ? batch : above) = middle;
  }

  while (tile < end) {
    while (tiles_before[batch + 1] <= tile) ++batch;
    const Scope scope(params, batch);
    const int full = scope.estimated(), stop = min(end, tiles_before[batch + 1]);
    const int* table = params.block_table + batch * params.block_table_stride;
    const int first_page = (tile - tiles_before[batch] + warp) * kTile, end_page = (stop - tiles_before[batch]) * kTile;
    // Numbers in the cache of this thread's two pages among 16. One past the end is the last one again; one that the
    // cache hasn't is its last page.
    auto find = [&](int (&numbers)[2], int page0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int number = __ldg(table + min(page0 + lane / 4 + 8 * i, full - 1));
        numbers[i] = min(max(number, 0), params.sketches.num_blocks - 1);
      }
    };
    float* scores = reinterpret_cast<float*>(params.scores + (int64_t{batch} * heads + head) * params.max_seqlen_q *
                                                                 params.quads() * params.max_blocks);
    const int quads = scope.q_len * params.quads();
    for (int first = 0; first < quads; first += kTiles) {
      // Sketches are fetched one step ahead, their pages' numbers two.
      int numbers[2];
      Codes<kRounds> next;
      find(numbers, first_page);
      next.load(params, numbers, head);
      find(numbers, first_page + kWarps * kTile);
      fill(queries, params, scope, batch, head, first);
      for (int page0 = first_page; page0 < end_page; page0 += kWarps * kTile) {
        const Codes<kRounds> codes = next;
        if (page0 + kWarps * kTile < end_page) {
          next.load(params, numbers, head);
          find(numbers, page0 + 2 * kWarps * kTile);
        }

        float linear[kTiles][4] = {}, deviation[kTiles][4] = {}, square[kTiles][4] = {};
#pragma unroll
        for (int round = 0; round < kRounds; ++round) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const uint32_t a = word_of(codes.means[0][round], word), b = word_of(codes.means[1][round], word);
            const uint32_t fragment[4] = {bytes<0>(a), bytes<0>(b), bytes<1>(a), bytes<1>(b)};
#pragma unroll
            for (int t = 0; t < kTiles; ++t) multiply(linear[t], fragment, queries.q[t][round][word][lane]);
          }
        }
#pragma unroll
        for (int round = 0; round < Codes<kRounds>::kDeviationRounds; ++round) {
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            const uint32_t a = word_of(codes.deviations[0][round], word), b = word_of(codes.deviations[1][round], word);
            const uint32_t fragments[2][4] = {{nibbles<0>(a), nibbles<0>(b), nibbles<1>(a), nibbles<1>(b)},
                                              {nibbles<2>(a), nibbles<2>(b), nibbles<3>(a), nibbles<3>(b)}};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t squares[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) squares[i] = squared(fragments[half][i]);
#pragma unroll
              for (int t = 0; t < kTiles; ++t) {
                const uint2 q = queries.squares[t][round][2 * word + half][lane];
                multiply(deviation[t], fragments[half], q);
                multiply(square[t], squares, q);
              }
            }
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          if (first + t >= quads) continue;
          const Row of_row = queries.rows[t * kHeads + lane % 4];
          const int counted = scope.counted((first + t) / params.quads());
          float x[2], most = kLowest;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int page = page0 + lane / 4 + 8 * i;
            // A query's two columns are neighbours in one thread.
            x[i] = log_mass(of_row, codes.scales[i], linear[t][2 * i] + linear[t][2 * i + 1],
                            deviation[t][2 * i] + deviation[t][2 * i + 1], square[t][2 * i] + square[t][2 * i + 1]);
            if (page < full) scores[(int64_t{first + t} * params.max_blocks + page) * kHeads + lane % 4] = x[i];
            if (page >= counted || !finite(x[i])) x[i] = -INFINITY;
            most = fmaxf(most, x[i]);
          }
          most = max_over_pages(most);
          const float mass = sum_over_pages(exp2f((x[0] - most) * kLog2E) + exp2f((x[1] - most) * kLog2E));
          if (lane < kHeads) {
            const int64_t quad = (int64_t{batch} * heads + head) * params.max_seqlen_q * params.quads() + first + t;
            params.tiles[(quad * params.tiles_of_list() + page0 / kTile) * kHeads + lane] = make_float2(most, mass);
          }
        }
      }
    }
    tile = stop;
  }
}

template <int kRounds, int kTiles>
cudaError_t launch(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  constexpr int kOfBlock = kGroups<kRounds, kTiles>, kThreads = kOfBlock * kGroupThreads;
  auto* kernel = &score_kernel<kRounds, kTiles>;
  const int smem = kOfBlock * int(sizeof(Queries<kRounds, kTiles>)) + 4 * (params.batch + 1);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
  if (error != cudaSuccess) return error;
  int blocks = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, smem);
  if (error != cudaSuccess) return error;
  // Every head has a group, though there were more heads than groups at one time.
  const int least = (params.sketches.heads_k + kOfBlock - 1) / kOfBlock;
  return launch_dependent(kernel, std::max(blocks * multiprocessors, least), kThreads, smem, stream, 1, params);
}

template <int kRounds>
cudaError_t launch_tiles(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  const int quads = params.max_seqlen_q * params.quads();
  if (quads <= 1) return launch<kRounds, 1>(params, multiprocessors, stream);
  if (quads <= 2) return launch<kRounds, 2>(params, multiprocessors, stream);
  return launch<kRounds, 4>(params, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_score(const SelectParams& params, int multiprocessors, cudaStream_t stream) {
  switch ((params.sketches.head_dim + 63) / 64) {
    case 1:
      return launch_tiles<1>(params, multiprocessors, stream);
    case 2:
      return launch_tiles<2>(params, multiprocessors, stream);
    case 3:
      return launch_tiles<3>(params, multiprocessors, stream);
    default:
      return launch_tiles<4>(params, multiprocessors, stream);
  }
}

}  // namespace lite_attention::pages

// From log-masses to lists: lite_attention/pages/estimate.py's `needed`, by threshold search.
//
// A block has one sequence and KV head. A page's rank is the largest share of mass that any query head has in it. Pages
// below the cut are dropped; the cut is the highest rank for which no head drops more than eps. It lies between eps /
// n, below which n pages have no more than eps together, and eps, above which one page alone has more. Between these
// the ranks, as the bits of their floats, are counted into bins, each head's shares summed per bin in fixed point, so
// that the order of summation does not matter. The bin in which the budget ends has few pages as a rule, which a warp
// compares with each other; where it has more it is the next range to be counted. So there is no sort, and pages of
// equal rank go together.
#include <algorithm>
#include <cfloat>

#include "dependent_launch.cuh"
#include "pages/launch.h"
#include "pages/layout.cuh"
#include "pages/scope.cuh"
#include "pages/warp.cuh"

namespace lite_attention::pages {
namespace {

// All sums run in an order that these fix: a list doesn't depend on the launch it is made in.
constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kBins = 512;
constexpr int kFew = 32;            // pages that a warp compares
constexpr int kAhead = 4;           // pages whose log-masses a thread fetches at one time
constexpr float kNotFinite = -1.f;  // in place of a share
constexpr float kLowest = -FLT_MAX;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMaxSmem = 227 * 1024, kBlocks = 2;  // of a multiprocessor

__device__ bool finite(float x) { return fabsf(x) <= FLT_MAX; }

__device__ uint32_t inclusive_sum(uint32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, x, step);
    if (threadIdx.x % 32 >= step) x += other;
  }
  return x;
}

// Dynamic shared memory.
struct Shared {
  float4* shares;   // where there is room for them: see Cut::shares_
  uint32_t* bins;   // (group, kBins)
  float2* partial;  // (quads * kHeads, kWarps), a warp's largest log-mass and the masses it has beside that
  float2* factors;  // (quads * kHeads), of all warps the largest, and one over all masses beside it
  uint32_t* base;   // (group), dropped below the present range
  int* offsets;     // (kThreads), of words in the list
  int* few;         // (kFew), pages in the bin where the budget ends
  int* found;       // how many it has
  int* first_over;  // the first bin at whose end some head has dropped too much
  uint32_t* cut;
  uint32_t* bits;  // (words)
  int room;        // bytes for shares and ranks

  __device__ Shared(const SelectParams& params, uint4* smem) {
    room = params.cut_room;
    shares = reinterpret_cast<float4*>(smem);
    bins = reinterpret_cast<uint32_t*>(smem) + room / 4;
    partial = reinterpret_cast<float2*>(bins + params.group * kBins);
    factors = partial + params.quads() * kHeads * kWarps;
    base = reinterpret_cast<uint32_t*>(factors + params.quads() * kHeads);
    offsets = reinterpret_cast<int*>(base + params.group);
    few = offsets + kThreads;
    found = few + kFew;
    first_over = found + 1;
    cut = reinterpret_cast<uint32_t*>(first_over + 1);
    bits = cut + 1;
  }
  // Without the room for shares.
  static int bytes(const SelectParams& params) {
    return 4 *
           (params.group * (kBins + 1) + 2 * params.quads() * kHeads * (kWarps + 1) + kThreads + kFew + 3 + params.words());
  }
};

// The pages of one query token.
struct Token {
  int counted;    // pages that it sees all of
  int first_new;  // from here to last_new all are listed
  int last_new;

  __device__ Token(const Scope& scope, int newest, int token) {
    const int position = scope.k_len - scope.q_len + token;
    counted = position < 0 ? 0 : (position + 1) / kPage;
    first_new = position < 0 ? 1 : max(position + 1 - newest, 0) / kPage;
    last_new = position < 0 ? 0 : position / kPage;
  }
  __device__ bool sees_any() const { return first_new <= last_new; }
  __device__ bool always(int page) const { return page == 0 || page >= first_new; }
};

class Cut {
 public:
  __device__ Cut(const SelectParams& params, const Shared& shared, int head, int batch)
      : params_(params),
        shared_(shared),
        scope_(params, batch),
        list_(int64_t{batch} * params.sketches.heads_k + head),
        quads_(params.quads()),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32) {
    const int full = scope_.estimated();
    in_shared_ = int64_t{full} * (quads_ * int(sizeof(float4)) + 4) <= shared.room;
    if (in_shared_) {
      shares_ = shared.shares;
      stride_ = full;
      ranks_ = reinterpret_cast<uint32_t*>(shares_ + int64_t{quads_} * full);
    } else {
      stride_ = params.max_blocks;
      ranks_ = params.ranks + list_ * params.max_blocks;
    }
  }

  __device__ void run() {
    uint32_t* bits = shared_.bits;
    float* left_out = params_.left_out + list_ * params_.group;
#pragma unroll 1
    for (int i = threadIdx.x; i < params_.group; i += kThreads) left_out[i] = 0.f;
    if (scope_.whole || scope_.q_len <= 0) {
      const int pages = scope_.q_len > 0 ? scope_.pages : 0;
#pragma unroll 1
      for (int word = threadIdx.x; word < params_.words(); word += kThreads) {
        bits[word] = word < pages / 32 ? ~0u : word == pages / 32 ? (1u << pages % 32) - 1 : 0;
      }
    } else {
#pragma unroll 1
      for (int word = threadIdx.x; word < params_.words(); word += kThreads) bits[word] = 0;
      __syncthreads();
      for (int token = 0; token < scope_.q_len; ++token) add_token(left_out, token);
    }
    __syncthreads();
    compact();
  }

 private:
  __device__ void add_token(float* left_out, int index) {
    const Token token(scope_, params_.newest, index);
    if (!token.sees_any()) return;
    uint32_t cut = 0;
    if (token.counted > 0) {
      // Fixed-point units by which all that may be dropped has 31 bits: pages of at most eps each.
      const float per_unit = 2147483648.f / fminf(1.f, float(token.counted) * params_.eps);
      copy_scores(index, token.counted);
      make_shares(token.counted);
      cut = find_cut(token, uint32_t(params_.eps * per_unit), per_unit);
#pragma unroll 1
      for (int i = threadIdx.x; i < params_.group; i += kThreads) {
        left_out[i] = fmaxf(left_out[i], float(shared_.base[i]) / per_unit);
      }
    }
    // Of each 32 pages a warp makes one word.
#pragma unroll 1
    for (int first = 32 * warp_; first <= token.last_new; first += kThreads) {
      const int page = first + lane_;
      const bool listed = page <= token.last_new && (token.always(page) || ranks_[page] >= cut);
      const uint32_t word = __ballot_sync(~0u, listed);
      if (lane_ == 0) shared_.bits[first / 32] |= word;
    }
    __syncthreads();  // all have read the ranks
  }

  // Log-masses, and of each head the largest and the mass of all pages beside it, by one pass. A quad is four heads side
  // by side.
  __device__ void copy_scores(int token, int counted) {
    float4* scores = params_.scores + (list_ * params_.max_seqlen_q + token) * quads_ * int64_t{params_.max_blocks};
    if (!in_shared_) shares_ = scores;
#pragma unroll 1
    for (int quad = 0; quad < quads_; ++quad) {
      const float4* from = scores + int64_t{quad} * params_.max_blocks;
      float4* to = shares_ + int64_t{quad} * stride_;
      float most[kHeads] = {kLowest, kLowest, kLowest, kLowest}, sum[kHeads] = {};
#pragma unroll 1
      for (int first = threadIdx.x; first < counted; first += kAhead * kThreads) {
        float4 x[kAhead];
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
          const int page = first + n * kThreads;
          x[n] = page < counted ? from[page] : make_float4(kLowest, kLowest, kLowest, kLowest);
        }
#pragma unroll
        for (int n = 0; n < kAhead; ++n) {
          const int page = first + n * kThreads;
          if (page < counted) to[page] = x[n];
        }
        for_heads([&](int i) {
          float above = most[i];
#pragma unroll
          for (int n = 0; n < kAhead; ++n) above = fmaxf(above, finite(at(x[n], i)) ? at(x[n], i) : kLowest);
          sum[i] *= exp2f((most[i] - above) * kLog2E);
#pragma unroll
          for (int n = 0; n < kAhead; ++n) {
            const float of_head = at(x[n], i);
            sum[i] += finite(of_head) && of_head > kLowest ? exp2f((of_head - above) * kLog2E) : 0.f;
          }
          most[i] = above;
        });
      }
      for_heads([&](int i) {
        const float of_warp = warp_max(most[i]);
        const float mass = warp_sum(sum[i] * exp2f((most[i] - of_warp) * kLog2E));
        if (lane_ == 0) shared_.partial[(quad * kHeads + i) * kWarps + warp_] = make_float2(of_warp, mass);
      });
    }
    __syncthreads();
#pragma unroll 1
    for (int head = warp_; head < quads_ * kHeads; head += kWarps) {
      const float2 part = lane_ < kWarps ? shared_.partial[head * kWarps + lane_] : make_float2(kLowest, 0.f);
      const float most = warp_max(part.x), sum = warp_sum(part.y * exp2f((part.x - most) * kLog2E));
      if (lane_ == 0) shared_.factors[head] = make_float2(most, sum > 0.f ? 1.f / sum : 1.f);
    }
    __syncthreads();
  }

  // Log-masses become shares of the mass of all pages; from these come the ranks: all ones where some head's mass isn't
  // finite.
  __device__ void make_shares(int counted) {
#pragma unroll 1
    for (int page = threadIdx.x; page < counted; page += kThreads) {
      float most = 0.f, least = 0.f;
#pragma unroll 1
      for (int quad = 0; quad < quads_; ++quad) {
        float4& share = shares_[int64_t{quad} * stride_ + page];
        float4 x = share;
        for_heads([&](int i) {
          const float2 factor = shared_.factors[quad * kHeads + i];
          float& of_head = at(x, i);
          of_head = !has(quad, i)     ? 0.f
                    : finite(of_head) ? exp2f((of_head - factor.x) * kLog2E) * factor.y
                                      : kNotFinite;
          most = fmaxf(most, of_head);
          least = fminf(least, of_head);
        });
        share = x;
      }
      ranks_[page] = least < 0.f ? ~0u : __float_as_uint(most);
    }
  }

  template <class Body>
  __device__ static void for_heads(const Body& body) {
#pragma unroll
    for (int i = 0; i < kHeads; ++i) body(i);
  }
  __device__ static float& at(float4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
  __device__ bool has(int quad, int i) const { return quad * kHeads + i < params_.group; }
  __device__ uint32_t units(int page, int head, float per_unit) const {
    const float4* quad = shares_ + int64_t{head / kHeads} * stride_ + page;
    return __float2uint_rn(reinterpret_cast<const float*>(quad)[head % kHeads] * per_unit);
  }

  // The rank, as bits, from which on pages are listed; `base` is what each head drops.
  __device__ uint32_t find_cut(const Token& token, uint32_t budget, float per_unit) {
    const int group = params_.group;
    uint32_t low = __float_as_uint(params_.eps / float(token.counted)), high = __float_as_uint(params_.eps) + 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < group; i += kThreads) shared_.base[i] = 0;
    for (bool first = true;; first = false) {
      // The first range has a bin more, for all that is below it.
      int shift = 0;
      while ((high - 1 - low) >> shift >= kBins - first) ++shift;
      if (threadIdx.x == 0) {
        *shared_.first_over = kBins;
        *shared_.found = 0;
        *shared_.cut = ~0u;
      }
#pragma unroll 1
      for (int i = threadIdx.x; i < group * kBins; i += kThreads) shared_.bins[i] = 0;
      __syncthreads();
      count(token, low, high, shift, first, per_unit);
      __syncthreads();
#pragma unroll 1
      for (int i = warp_; i < group; i += kWarps) {
        const int bin = first_over(i, budget);
        if (lane_ == 0) atomicMin(shared_.first_over, bin);
      }
      __syncthreads();
      const int bin = *shared_.first_over;
#pragma unroll 1
      for (int i = warp_; i < group; i += kWarps) {
        const uint32_t sum = sum_before(i, bin);
        if (lane_ == 0) shared_.base[i] += sum;
      }
      if (bin < first) return sync(0);  // rounding: the least that there is has too much
      if (bin < kBins) {
        low += uint32_t(bin - first) << shift;
        high = min(high, low + (1u << shift));
#pragma unroll 1
        for (int page = threadIdx.x; page < token.counted; page += kThreads) {
          if (token.always(page) || ranks_[page] < low || ranks_[page] >= high) continue;
          const int place = atomicAdd(shared_.found, 1);
          if (place < kFew) shared_.few[place] = page;
        }
      }
      __syncthreads();
      if (bin == kBins) return high;
      if (shift == 0) return low;
      if (*shared_.found <= kFew) return compare(budget, per_unit);
      __syncthreads();  // all have read how many there are
    }
  }

  // Adds up the shares of the ranks in [low, high) by bins of 2^shift; in the first range also those below, which may
  // be nearly all, and are added up by each thread for itself.
  __device__ void count(const Token& token, uint32_t low, uint32_t high, int shift, bool first, float per_unit) const {
#pragma unroll 1
    for (int quad = 0; quad < quads_; ++quad) {
      uint32_t lowest[kHeads] = {};
      uint32_t* bins = shared_.bins + quad * kHeads * kBins;
#pragma unroll 1
      for (int page = threadIdx.x; page < token.counted; page += kThreads) {
        const uint32_t rank = ranks_[page];
        if (token.always(page) || rank >= high || (rank < low && !first)) continue;
        float4 share = shares_[int64_t{quad} * stride_ + page];
        for_heads([&](int i) {
          const uint32_t units = __float2uint_rn(at(share, i) * per_unit);
          if (rank < low) {
            lowest[i] += units;
          } else if (units > 0) {
            atomicAdd(bins + i * kBins + int((rank - low) >> shift) + first, units);
          }
        });
      }
      for_heads([&](int i) {
        const uint32_t sum = __reduce_add_sync(~0u, lowest[i]);
        if (lane_ == 0 && sum > 0) atomicAdd(bins + i * kBins, sum);
      });
    }
  }

  __device__ static uint32_t sync(uint32_t x) {
    __syncthreads();
    return x;
  }

  // A warp for each head looks at the few pages: is what ranks as high and lower too much? The cut is the lowest rank for
  // which it is to any of them, and base what is below it.
  __device__ uint32_t compare(uint32_t budget, float per_unit) const {
    const int found = *shared_.found, page = shared_.few[lane_ < found ? lane_ : 0];
    const uint32_t rank = lane_ < found ? ranks_[page] : ~0u;
#pragma unroll 1
    for (int i = warp_; i < params_.group; i += kWarps) {
      const uint32_t mine = lane_ < found ? units(page, i, per_unit) : 0;
      uint32_t sum = shared_.base[i];
#pragma unroll 4
      for (int other = 0; other < 32; ++other) {
        const uint32_t of_other = __shfl_sync(~0u, mine, other);
        sum += __shfl_sync(~0u, rank, other) <= rank ? of_other : 0;
      }
      const uint32_t cut = __reduce_min_sync(~0u, lane_ < found && sum > budget ? rank : ~0u);
      if (lane_ == 0) atomicMin(shared_.cut, cut);
    }
    __syncthreads();
    const uint32_t cut = *shared_.cut;
#pragma unroll 1
    for (int i = warp_; i < params_.group; i += kWarps) {
      const uint32_t dropped = __reduce_add_sync(~0u, lane_ < found && rank < cut ? units(page, i, per_unit) : 0);
      if (lane_ == 0) shared_.base[i] += dropped;
    }
    return sync(cut);
  }

  // The first bin at whose end the head has dropped more than its budget; kBins where there is none.
  __device__ int first_over(int i, uint32_t budget) const {
    uint32_t chunk = 0;  // sum of 32 bins: of chunk n in lane n
#pragma unroll 4
    for (int n = 0; n < kBins / 32; ++n) {
      const uint32_t sum = __reduce_add_sync(~0u, shared_.bins[i * kBins + n * 32 + lane_]);
      if (lane_ == n) chunk = sum;
    }
    const uint32_t up_to = shared_.base[i] + inclusive_sum(chunk);
    const uint32_t over = __ballot_sync(~0u, up_to > budget);
    if (over == 0) return kBins;
    const int first = __ffs(over) - 1;
    const uint32_t before = __shfl_sync(~0u, up_to - chunk, first);
    const uint32_t inside = before + inclusive_sum(shared_.bins[i * kBins + first * 32 + lane_]);
    return first * 32 + __ffs(__ballot_sync(~0u, inside > budget)) - 1;
  }

  __device__ uint32_t sum_before(int i, int bin) const {
    uint32_t sum = 0;
#pragma unroll 1
    for (int k = lane_; k < bin; k += 32) sum += shared_.bins[i * kBins + k];
    return __reduce_add_sync(~0u, sum);
  }

  // The bits, and indices and count from them.
  __device__ void compact() {
    const uint32_t* bits = shared_.bits;
#pragma unroll 1
    for (int word = threadIdx.x; word < params_.words(); word += kThreads) {
      params_.bits[list_ * params_.words() + word] = bits[word];
    }
    int* indices = params_.indices + list_ * params_.max_blocks;
    const int words = (scope_.pages + 31) / 32;
    int count = 0;
#pragma unroll 1
    for (int first = 0; first < words; first += kThreads) {
      const int mine = first + threadIdx.x;
      const uint32_t listed = __popc(mine < words ? bits[mine] : 0), inclusive = inclusive_sum(listed);
      int* warp_counts = reinterpret_cast<int*>(shared_.bins);
      if (lane_ == 31) warp_counts[warp_] = inclusive;
      __syncthreads();
      const int of_warp = lane_ < kWarps ? warp_counts[lane_] : 0;
      const int before = __reduce_add_sync(~0u, lane_ < warp_ ? of_warp : 0);
      shared_.offsets[threadIdx.x] = count + before + inclusive - listed;
      count += __reduce_add_sync(~0u, of_warp);
      __syncthreads();
#pragma unroll 1
      for (int word = warp_; word < min(kThreads, words - first); word += kWarps) {
        const uint32_t set = bits[first + word];
        if (set >> lane_ & 1) {
          indices[shared_.offsets[word] + __popc(set & ((1u << lane_) - 1))] = (first + word) * 32 + lane_;
        }
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) params_.counts[list_] = count;
  }

  const SelectParams& params_;
  const Shared& shared_;
  const Scope scope_;
  const int64_t list_;
  const int quads_, warp_, lane_;
  // Of the present token: (quads, stride), and (pages). In shared memory where they fit, else where the scores are.
  bool in_shared_;
  float4* shares_;
  uint32_t* ranks_;
  int stride_;
};

__global__ __launch_bounds__(kThreads, kBlocks) void cut_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 smem[];
  const Shared shared(params, smem);
  wait_for_kernels_before();
  let_next_kernel_wait();
  Cut(params, shared, blockIdx.x, blockIdx.y).run();
}

}  // namespace

cudaError_t launch_cut(SelectParams params, int multiprocessors, cudaStream_t stream) {
  // Room beside the other blocks of a multiprocessor, unless there are too few blocks for all of them anyway.
  const bool few = params.batch * params.sketches.heads_k <= multiprocessors;
  const int fixed = Shared::bytes(params), limit = few ? kMaxSmem : (kMaxSmem + 1024) / kBlocks - 1024;
  const int64_t wanted = int64_t{params.max_blocks} * (params.quads() * int(sizeof(float4)) + 4);
  params.cut_room = int(std::min<int64_t>(wanted, std::max(0, limit - fixed)) / 16 * 16);
  cudaError_t error =
      cudaFuncSetAttribute(cut_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, params.cut_room + fixed);
  if (error != cudaSuccess) return error;
  return launch_dependent(cut_kernel, dim3(params.sketches.heads_k, params.batch), kThreads, params.cut_room + fixed,
                          stream, 1, params);
}

}  // namespace lite_attention::pages

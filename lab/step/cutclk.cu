// From log-masses to lists: lite_attention/pages/estimate.py's `needed`, by threshold search.
//
// A cluster of blocks has one sequence and KV head, each block an equal part of its pages. A page's rank is the largest
// share of mass that any query head has in it. Pages below the cut are dropped; the cut is the highest rank for which
// no head drops more than eps. It lies between eps / n, below which n pages have no more than eps together, and eps,
// above which one page alone has more. Between these the ranks, as the bits of their floats, are counted into bins,
// each head's shares summed per bin in fixed point, so that neither the order of summation nor the number of blocks
// matters. The bin in which the budget ends has few pages as a rule, which are compared with each other; where it has
// more it is the next range to be counted. So there is no sort, and pages of equal rank go together.
//
// Each step is over a few pages a thread, so what counts is how often threads and blocks wait for each other. Every
// block therefore has what all have counted, sent there by the others, and decides for itself. What a message says of
// one round is read before any block can send that of the next, as it needs a later message of this one first.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <algorithm>
#include <cstdio>

#include "dependent_launch.cuh"
#include "pages/cut_state.cuh"
#include "pages/exchange.cuh"
#include "pages/launch.h"
#include "pages/layout.cuh"
#include "pages/scope.cuh"
#include "pages/whole.cuh"

namespace lite_attention::pages {
namespace {

constexpr int kLeastPages = 512;                   // of a block, for a cluster to be worth it
constexpr int kMaxSmem = 227 * 1024, kBlocks = 2;  // of a multiprocessor

// The pages of one query token.
struct Token {
  int counted;    // pages that it sees all of
  int first_new;  // from here to last_new all are listed
  int last_new;

  __device__ Token(const Scope& scope, int newest, int token) {
    const int position = scope.k_len - scope.q_len + token;
    counted = scope.counted(token);
    first_new = position < 0 ? 1 : max(position + 1 - newest, 0) / kPage;
    last_new = position < 0 ? 0 : position / kPage;
  }
  __device__ bool sees_any() const { return first_new <= last_new; }
  __device__ bool always(int page) const { return page == 0 || page >= first_new; }
};

class Cut {
 public:
  __device__ Cut(const SelectParams& params, uint4* smem, Search& search)
      : params_(params),
        search_(search),
        blocks_(int(cooperative_groups::this_cluster().num_blocks())),
        rank_(int(cooperative_groups::this_cluster().block_rank())),
        parts_(search.arrivals[kParts], blocks_),
        sums_(search.arrivals[kSums], blocks_),
        found_(search.arrivals[kFound], blocks_),
        all_listed_(search.arrivals[kListed], blocks_),
        words_(words_of_block(params.words(), blocks_)),
        shared_(params, words_, blocks_, smem),
        scope_(params, blockIdx.y),
        list_(int64_t{blockIdx.y} * params.sketches.heads_k + blockIdx.x / blocks_),
        quads_(params.quads()),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        first_(rank_ * words_ * 32),
        end_(min(first_ + words_ * 32, scope_.pages)) {
    const int estimated = min(max(0, scope_.estimated() - first_), words_ * 32);
    if (int64_t{estimated} * (quads_ * int(sizeof(float4)) + 4) <= shared_.room) {
      in_shared_ = true;
      shares_ = shared_.shares;
      stride_ = estimated;
      ranks_ = reinterpret_cast<uint32_t*>(shares_ + int64_t{quads_} * estimated);
    } else {
      in_shared_ = false;
      stride_ = params.max_blocks;
      ranks_ = params.ranks + list_ * params.max_blocks + first_;
    }
  }

  // What needs no scores, which is all where all pages are listed.
  __device__ void begin() {
    const int all = scope_.whole && scope_.q_len > 0 ? scope_.pages : 0, mine = max(0, min(words_ * 32, all - first_));
    for_threads(words_, [&](int word) {
      const uint32_t set = word < mine / 32 ? ~0u : word == mine / 32 ? (1u << mine % 32) - 1 : 0;
      shared_.bits[word] = set;
      if (scope_.whole && rank_ * words_ + word < params_.words()) bits()[word] = set;
    });
    if (scope_.whole) {
      for_threads(mine, [&](int page) { indices()[first_ + page] = first_ + page; });
    } else {
      clear_counts();
    }
    if (rank_ == 0) {
      for_threads(params_.group, [&](int i) { left_out()[i] = 0.f; });
      if (scope_.whole && threadIdx.x == 0) params_.counts[list_] = all;
    }
    __syncthreads();
    if (blocks_ > 1) meet();
  }

  __device__ void run() {
    if (scope_.whole) return;
#pragma unroll 1
    for (int token = 0; token < scope_.q_len; ++token) {
      if (token > 0) recount();
      add_token(token);
    }
    mark();
    compact();
  }

 public:
  mutable long long t_[24]; mutable int nt_ = 0;
  __device__ void mark() const { if (threadIdx.x == 0 && nt_ < 24) t_[nt_++] = clock64(); }
  // Where this block's bits begin, and the list's numbers.
  __device__ uint32_t* bits() const { return params_.bits + list_ * params_.words() + rank_ * words_; }
  __device__ int* indices() const { return params_.indices + list_ * params_.max_blocks; }
  __device__ float* left_out() const { return params_.left_out + list_ * params_.group; }

  __device__ void add_token(int index) {
    const Token token(scope_, params_.newest, index);
    if (!token.sees_any()) return;
    uint32_t cut = 0;
    if (token.counted > 0) {
      const int64_t quad = (list_ * params_.max_seqlen_q + index) * quads_;
      fetch(params_.scores + quad * params_.max_blocks + first_, token.counted);
      mark();
      add_masses(params_.tiles + quad * params_.tiles_of_list() * kHeads, token.counted);
      mark();
      make_shares(token);
      mark();
      cut = find_cut(token);
    }
    mark();
    // Of each 32 pages a warp makes one word. Its threads are those that have found the ranks.
    for_warps((min(end_, token.last_new + 1) - first_ + 31) / 32, [&](int word) {
      const int local = 32 * word + lane_, page = first_ + local;
      const bool listed = page <= token.last_new && (token.always(page) || ranks_[local] >= cut);
      const uint32_t set = __ballot_sync(~0u, listed);
      if (lane_ == 0) shared_.bits[word] |= set;
    });
  }

  // Log-masses to where they become shares. Each thread waits for those that it fetched, and needs no others.
  __device__ void fetch(float4* scores, int counted) {
    if (!in_shared_) {
      shares_ = scores;
      return;
    }
    for_threads(min(end_, counted) - first_, [&](int page) {
#pragma unroll 1
      for (int quad = 0; quad < quads_; ++quad) {
        __pipeline_memcpy_async(shares_ + int64_t{quad} * stride_ + page,
                                scores + int64_t{quad} * params_.max_blocks + page, sizeof(float4));
      }
    });
    __pipeline_commit();
  }

  // The mass of all pages for each head: every block adds up the tiles of all. A thread has one head's tiles, a warp
  // four heads'.
  __device__ void add_masses(const float2* tiles, int counted) {
    const int count = (counted + kTile - 1) / kTile * kHeads, heads = quads_ * kHeads;
    const int warps = kWarps / quads_, quad = warp_ / warps, warp = warp_ - quad * warps;
    if (quad < quads_) {
      constexpr int kAtOnce = 4;
      Mass mass;
      const float2* of_quad = tiles + int64_t{quad} * params_.tiles_of_list() * kHeads;
#pragma unroll 1
      for (int first = warp * 32 + lane_; first < count; first += kAtOnce * warps * 32) {
        float2 masses[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int tile = first + i * warps * 32;
          masses[i] = tile < count ? of_quad[tile] : make_float2(kLowest, 0.f);
        }
        mass.add(masses);
      }
      mass.add_lanes<kHeads>();
      if (lane_ < kHeads) shared_.partial[(quad * kHeads + lane_) * kWarps + warp] = make_float2(mass.most, mass.sum);
    }
    __syncthreads();
    for_warps(heads, [&](int head) {
      const float2 of_warp[] = {lane_ < warps ? shared_.partial[head * kWarps + lane_] : make_float2(kLowest, 0.f)};
      Mass mass;
      mass.add(of_warp);
      mass.add_lanes<1>();
      // Heads that the group hasn't get no share of anything.
      const bool any = head < params_.group && mass.sum > 0.f;
      if (lane_ == 0) reinterpret_cast<float*>(shared_.factors)[head] = any ? mass.most + log2f(mass.sum) : INFINITY;
    });
    __syncthreads();
  }

  // Log-masses become shares of the mass of all pages; from these come the ranks: all ones where some head's mass isn't
  // finite. A quad is four heads side by side.
  __device__ void make_shares(const Token& token) {
    __pipeline_wait_prior(0);
    for_threads(min(end_, token.counted) - first_, [&](int page) {
      float most = 0.f;
      bool known = true;
#pragma unroll 1
      for (int quad = 0; quad < quads_; ++quad) {
        float4& here = shares_[int64_t{quad} * stride_ + page];
        float4 x = here, factors = shared_.factors[quad];
        for_heads([&](int i) {
          known = known && finite(at(x, i));
          at(x, i) = exp2_approximate(at(x, i) - at(factors, i));
          most = fmaxf(most, at(x, i));
        });
        here = x;
      }
      ranks_[page] = known ? __float_as_uint(most) : ~0u;
    });
  }

  // The rank, as bits, from which on pages are listed.
  __device__ uint32_t find_cut(const Token& token) {
    // Fixed-point units by which all that may be dropped has 31 bits: pages of at most eps each.
    const float per_unit = 2147483648.f / fminf(1.f, float(token.counted) * params_.eps);
    const uint32_t budget = uint32_t(params_.eps * per_unit);
    Range range{__float_as_uint(params_.eps / float(token.counted)), __float_as_uint(params_.eps) + 1, 1};
    uint32_t cut;
#pragma unroll 1
    while (true) {
      count(token, range, per_unit);
      mark();
      add_up();
      mark();
      const int over = narrow(range, budget);
      if (over < range.first_bin) {  // rounding: the least that there is has too much
        cut = 0;
        break;
      }
      if (over == kBins) {
        cut = range.high;
        break;
      }
      mark();
      const bool exact = range.shift() == 0;
      range = range.of_bin(over);
      if (exact) {
        cut = range.low;
        break;
      }
      if (threadIdx.x == 0) search_.cut = range.high;
      const int found = collect(token, range, per_unit);
      mark();
      few_ = found;
      if (found <= kFew) {
        cut = compare(found, budget);
        break;
      }
      recount();
    }
    if (rank_ == 0) {  // lanes that have written what is dropped
      for_warps(params_.group, [&](int head) {
        float& worst = left_out()[head];
        if (lane_ == 0) worst = fmaxf(worst, float(shared_.base[head]) / per_unit);
      });
    }
    return cut;
  }

  // Ranks from low on and below high, by bins of 2^shift. The first range has a bin more, for all that is below it.
  struct Range {
    uint32_t low, high;
    int first_bin;

    __device__ int shift() const {
      const uint32_t last = high - 1 - low;
      const int least = max(0, 32 - __clz(last) - 9);  // by which it is less than kBins
      return least + (int(last >> least) >= kBins - first_bin);
    }
    __device__ int bin(uint32_t rank, int shift) const {
      return rank < low ? 0 : int((rank - low) >> shift) + first_bin;
    }
    __device__ Range of_bin(int bin) const {
      const uint32_t begin = low + (uint32_t(bin - first_bin) << shift());
      return {begin, min(high, begin + (1u << shift())), 0};
    }
  };

  // What a count begins with.
  __device__ void clear_counts() {
    for_threads(params_.group * kBins, [&](int i) { shared_.bins[i] = 0; });
    if (threadIdx.x == 0) search_.over = kBins, search_.found_here = 0;
  }
  __device__ void recount() {
    __syncthreads();
    clear_counts();
    __syncthreads();
  }

  // Adds up the shares of this block's ranks by bins; those below the range, which may be nearly all, by each thread
  // for itself.
  __device__ void count(const Token& token, const Range& range, float per_unit) const {
    const int shift = range.shift(), counted = min(end_, token.counted) - first_;
#pragma unroll 1
    for (int quad = 0; quad < quads_; ++quad) {
      uint32_t lowest[kHeads] = {};
      uint32_t* bins = shared_.bins + quad * kHeads * kBins;
      for_threads(counted, [&](int page) {
        const uint32_t rank = ranks_[page];
        if (rank >= range.high || (rank < range.low && range.first_bin == 0) || token.always(first_ + page)) return;
        float4 share = shares_[int64_t{quad} * stride_ + page];
        uint32_t units[kHeads];
        for_heads([&](int i) { units[i] = __float2uint_rn(at(share, i) * per_unit); });
        if (rank < range.low) {
          for_heads([&](int i) { lowest[i] += units[i]; });
        } else {
          uint32_t* bin = bins + range.bin(rank, shift);
          for_heads([&](int i) {
            if (units[i] > 0) atomicAdd(bin + i * kBins, units[i]);
          });
        }
      });
      if (range.first_bin == 0) continue;
      for_heads([&](int i) {
        const uint32_t sum = __reduce_add_sync(~0u, lowest[i]);
        if (lane_ == 0 && sum > 0) atomicAdd(bins + i * kBins, sum);
      });
    }
  }

  // From here on all blocks can be sent something.
  __device__ void meet() {
    if (threadIdx.x == 0) {
      for (const Exchange* each : {&parts_, &sums_, &found_, &all_listed_}) each->init();
      Exchange::fence_init();
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  }

  // The bins of all blocks. Each adds up an equal part of them for all; some warps see to each block that it sends to.
  __device__ void add_up() {
    __syncthreads();
    if (blocks_ == 1) return;
    const int part = params_.group * kBins / blocks_, vectors = part / 4, warps = kWarps / blocks_;
    const int block = warp_ / warps, first = (warp_ - block * warps) * 32 + lane_, step = warps * 32;
    const auto* bins = reinterpret_cast<const uint4*>(shared_.bins) + block * vectors;
    auto* parts = reinterpret_cast<uint4*>(shared_.parts);
    for (int i = first; i < vectors; i += step) parts_.send(block, parts + rank_ * vectors + i, bins[i]);
    if (first == 0) parts_.close(block, part * 4);
    parts_.wait();
    for (int i = first; i < vectors; i += step) {
      uint4 sum = parts[i];
#pragma unroll 1
      for (int other = 1; other < blocks_; ++other) {
        const uint4 x = parts[other * vectors + i];
        sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
      }
      sums_.send(block, reinterpret_cast<uint4*>(shared_.sums) + rank_ * vectors + i, sum);
    }
    __syncthreads();  // parts have been read, so that those of the next round may come
    if (first == 0) sums_.close(block, part * 4);
    sums_.wait();
  }

  // The bin in which the budget ends, kBins where there is none; `base` is what is dropped below it. Of each quarter of
  // a head's bins a lane has four that are neighbours.
  __device__ int narrow(const Range& range, uint32_t budget) {
    for_warps(params_.group, [&](int head) {
      uint32_t up_to = range.first_bin == 0 ? shared_.base[head] : 0;
      int over = kBins;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const uint4 bins = quarter_of_bins(head, quarter);
        const uint32_t sum = bins.x + bins.y + bins.z + bins.w, inclusive = inclusive_sum(sum);
        const uint32_t x = up_to + inclusive - sum + bins.x, y = x + bins.y, z = y + bins.z, w = z + bins.w;
        const int bin = 128 * quarter + 4 * lane_;
        if (w > budget) over = min(over, x > budget ? bin : y > budget ? bin + 1 : z > budget ? bin + 2 : bin + 3);
        up_to += __shfl_sync(~0u, inclusive, 31);
      }
      over = __reduce_min_sync(~0u, over);
      if (lane_ == 0) atomicMin(&search_.over, over);
    });
    __syncthreads();
    const int over = search_.over;
    for_warps(params_.group, [&](int head) {
      uint32_t sum = 0;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const uint4 bins = quarter_of_bins(head, quarter);
        const int before = over - (128 * quarter + 4 * lane_);  // of these bins and after
        sum += (before > 0 ? bins.x : 0) + (before > 1 ? bins.y : 0) + (before > 2 ? bins.z : 0) +
               (before > 3 ? bins.w : 0);
      }
      sum = __reduce_add_sync(~0u, sum);
      if (lane_ == 0) shared_.base[head] = (range.first_bin == 0 ? shared_.base[head] : 0) + sum;
    });
    return over;
  }

  __device__ uint4 quarter_of_bins(int head, int quarter) const {
    return reinterpret_cast<const uint4*>(shared_.sums + head * kBins + 128 * quarter)[lane_];
  }

  // How many pages of all blocks the range has. Where each has few, every block gets them all; else it is more than
  // few.
  __device__ int collect(const Token& token, const Range& range, float per_unit) {
    const int group = params_.group;
    for_threads(min(end_, token.counted) - first_, [&](int page) {
      const uint32_t rank = ranks_[page];
      if (rank < range.low || rank >= range.high || token.always(first_ + page)) return;
      const int place = atomicAdd(&search_.found_here, 1);
      if (place >= kFew) return;
      shared_.own_ranks[place] = rank;
#pragma unroll 1
      for (int i = 0; i < group; ++i) {
        const float4* quad = shares_ + int64_t{i / kHeads} * stride_ + page;
        shared_.own_units[place * group + i] =
            __float2uint_rn(reinterpret_cast<const float*>(quad)[i % kHeads] * per_unit);
      }
    });
    __syncthreads();
    const int found_here = search_.found_here;
    if (blocks_ == 1) return found_here;
    const int room = kFew / blocks_, sent = found_here <= room ? found_here : 0;
    for_warps(blocks_, [&](int block) {
      for (int i = lane_; i < sent; i += 32) {
        found_.send(block, shared_.sent_ranks + rank_ * room + i, shared_.own_ranks[i]);
      }
      for (int i = lane_; i < sent * group; i += 32) {
        found_.send(block, shared_.sent_units + rank_ * room * group + i, shared_.own_units[i]);
      }
      if (lane_ == 0) {
        found_.send(block, &search_.found[rank_], found_here);
        found_.close(block, 4 * (1 + sent * (1 + group)));
      }
    });
    found_.wait();
    const int of_block = lane_ < blocks_ ? search_.found[lane_] : 0;
    if (__any_sync(~0u, of_block > room)) return kFew + 1;
    // Side by side.
    const int found = __reduce_add_sync(~0u, of_block);
    for_threads(found, [&](int i) {
      int block = 0, place = i;
      while (place >= search_.found[block]) place -= search_.found[block++];
      const int from = block * room + place;
      shared_.few_ranks[i] = shared_.sent_ranks[from];
#pragma unroll 1
      for (int head = 0; head < group; ++head) {
        shared_.few_units[i * group + head] = shared_.sent_units[from * group + head];
      }
    });
    __syncthreads();
    return found;
  }

  // A thread looks at each of the few pages: is what ranks as high and lower too much for any head? The cut is the
  // lowest rank for which it is, and base what is below that.
  __device__ uint32_t compare(int found, uint32_t budget) {
    const int group = params_.group;
    for_threads(found * group, [&](int i) {
      const int page = i / group, head = i - page * group;
      const uint32_t rank = shared_.few_ranks[page];
      uint32_t sum = shared_.base[head];
#pragma unroll 4
      for (int other = 0; other < found; ++other) {
        if (shared_.few_ranks[other] <= rank) sum += shared_.few_units[other * group + head];
      }
      if (sum > budget) atomicMin(&search_.cut, rank);
    });
    __syncthreads();
    const uint32_t cut = search_.cut;
    for_warps(rank_ == 0 ? group : 0, [&](int head) {
      uint32_t dropped = 0;
      for (int page = lane_; page < found; page += 32) {
        if (shared_.few_ranks[page] < cut) dropped += shared_.few_units[page * group + head];
      }
      dropped = __reduce_add_sync(~0u, dropped);
      if (lane_ == 0) shared_.base[head] += dropped;
    });
    return cut;
  }

  // The bits, and indices and count from them.
  __device__ void compact() {
    __syncthreads();
    const int words = min(words_, params_.words() - rank_ * words_);
    int listed = 0;
#pragma unroll 1
    for (int first = 0; first < words; first += kThreads) {
      const int word = first + threadIdx.x;
      const uint32_t set = word < words ? shared_.bits[word] : 0, count = __popc(set), inclusive = inclusive_sum(count);
      if (word < words) bits()[word] = set;
      if (lane_ == 31) search_.of_warps[warp_] = inclusive;
      __syncthreads();
      const int of_warp = lane_ < kWarps ? search_.of_warps[lane_] : 0;
      const int before = listed + __reduce_add_sync(~0u, lane_ < warp_ ? of_warp : 0);
      if (word < words) shared_.offsets[word] = before + inclusive - count;
      listed += __reduce_add_sync(~0u, of_warp);
      __syncthreads();
    }
    int before = 0, total = listed;
    if (blocks_ > 1) {
      if (threadIdx.x < blocks_) {
        all_listed_.send(threadIdx.x, &search_.listed[rank_], listed);
        all_listed_.close(threadIdx.x, sizeof(int));
      }
      all_listed_.wait();
      const int of_block = lane_ < blocks_ ? search_.listed[lane_] : 0;
      before = __reduce_add_sync(~0u, lane_ < rank_ ? of_block : 0);
      total = __reduce_add_sync(~0u, of_block);
    }
    if (rank_ == 0 && threadIdx.x == 0) params_.counts[list_] = total;
    for_warps(words, [&](int word) {
      const uint32_t set = shared_.bits[word];
      if (set >> lane_ & 1) {
        const int place = before + shared_.offsets[word] + __popc(set & ((1u << lane_) - 1));
        indices()[place] = first_ + word * 32 + lane_;
      }
    });
  }

  const SelectParams& params_;
  Search& search_;
  const int blocks_, rank_;
  Exchange parts_, sums_, found_, all_listed_;
  const int words_;  // of a block
  const Shared shared_;
  const Scope scope_;
  const int64_t list_;
  const int quads_, warp_, lane_;
  const int first_, end_;  // this block's pages
  // Of the present token and this block's pages: (quads, stride), and (pages). In shared memory where they fit, else
  // where the scores are.
  int few_ = 0;
  bool in_shared_;
  float4* shares_;
  uint32_t* ranks_;
  int stride_;
};

__global__ __launch_bounds__(kThreads, kBlocks) void cut_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 smem[];
  __shared__ Search search;
  // Where this is the first kernel of the call nothing of before may be there yet; after the score kernel only its
  // results are not.
  if (!params.scores) wait_for_kernels_before();
  let_next_kernel_wait();
  if (step_without_lists(params)) {
    if (blockIdx.x == 0 && blockIdx.y == 0) wait_for_kernels_before();
    return;
  }
  Cut cut(params, smem, search);
  cut.begin();
  cut.mark();
  if (params.scores) wait_for_kernels_before();
  cut.mark();
  cut.run();
  cut.mark();
  if (threadIdx.x == 0 && blockIdx.y == 0 && blockIdx.x < 1) {
    printf("CUT few %d: %lld %lld %lld %lld %lld %lld %lld %lld %lld %lld %lld\n", cut.few_, cut.t_[1] - cut.t_[0], cut.t_[2] - cut.t_[1], cut.t_[3] - cut.t_[2], cut.t_[4] - cut.t_[3], cut.t_[5] - cut.t_[4], cut.t_[6] - cut.t_[5], cut.t_[7] - cut.t_[6], cut.t_[8] - cut.t_[7], cut.t_[9] - cut.t_[8], cut.t_[10] - cut.t_[9], cut.t_[11] - cut.t_[10]);
  }
}

// Of a block's shared memory: what the launch asks for begins at the next multiple of 16.
constexpr int kSearchBytes = (int(sizeof(Search)) + 15) / 16 * 16;

bool fits(const SelectParams& params, int cluster) {
  return Shared::bytes(params, words_of_block(params.words(), cluster), cluster) + kSearchBytes <= kMaxSmem;
}

// Few lists are shared among blocks until there is one for every multiprocessor.
int blocks_of_list(const SelectParams& params, int multiprocessors) {
  const int lists = params.batch * params.sketches.heads_k;
  int cluster = 1;
  while (2 * cluster <= kMaxCluster && 2 * cluster * lists <= multiprocessors &&
         params.max_blocks >= 2 * cluster * kLeastPages) {
    cluster *= 2;
  }
  return fits(params, cluster) ? cluster : 1;  // one block does not need the counts of others
}

}  // namespace

bool cut_fits(const SelectParams& params, int multiprocessors) {
  return fits(params, blocks_of_list(params, multiprocessors));
}

cudaError_t launch_cut(SelectParams params, int multiprocessors, cudaStream_t stream) {
  const int lists = params.batch * params.sketches.heads_k, cluster = blocks_of_list(params, multiprocessors);
  // Room beside the other blocks of a multiprocessor, unless there are too few blocks for all of them anyway. Of a
  // block's memory its Search takes a part, and the system 1 KiB more.
  const int words = words_of_block(params.words(), cluster);
  const int fixed = Shared::bytes(params, words, cluster);
  const int of_block = lists * cluster <= multiprocessors ? kMaxSmem : (kMaxSmem + 1024) / kBlocks - 1024;
  const int limit = of_block - kSearchBytes;
  const int64_t wanted = int64_t{words} * 32 * (params.quads() * int(sizeof(float4)) + 4);
  params.cut_room = int(std::min<int64_t>(wanted, std::max(0, limit - fixed)) / 16 * 16);
  cudaError_t error =
      cudaFuncSetAttribute(cut_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, params.cut_room + fixed);
  if (error != cudaSuccess) return error;
  return launch_dependent(cut_kernel, dim3(params.sketches.heads_k * cluster, params.batch), kThreads,
                          params.cut_room + fixed, stream, cluster, params);
}

}  // namespace lite_attention::pages

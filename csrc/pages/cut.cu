// From log-masses to lists: lite_attention/pages/estimate.py's `needed`, by threshold search.
//
// A cluster of blocks has one sequence and KV head, each block an equal part of its pages. A page's rank is the largest
// share of mass that any query head has in it. Pages below the cut are dropped; the cut is the highest rank for which
// no head drops more than eps. It lies between eps / n, below which n pages have no more than eps together, and eps,
// above which one page alone has more, and among the ranks that there are. Between these the ranks, as the bits of
// their floats, are counted into bins, each head's shares summed per bin in fixed point, so that neither the order of
// summation nor the number of blocks matters. The bin in which the budget ends has few pages as a rule, which the first
// block compares with each other; where it has more it is the next range to be counted. So there is no sort, and pages
// of equal rank go together.
//
// Each step is over a few pages a thread, and what runs so seldom comes from L2 instruction by instruction: loops are
// not unrolled but where loads are to be under way together.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <algorithm>

#include "dependent_launch.cuh"
#include "pages/cut_state.cuh"
#include "pages/launch.h"
#include "pages/layout.cuh"
#include "pages/scope.cuh"

namespace lite_attention::pages {
namespace {

constexpr int kMaxCluster = 8;
constexpr int kLeastPages = 512;                   // of a block, for a cluster to be worth it
constexpr float kNotFinite = -1.f;                 // in place of a share
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
        cluster_(cooperative_groups::this_cluster()),
        blocks_(int(cluster_.num_blocks())),
        rank_(int(cluster_.block_rank())),
        words_(words_of_block(params.words(), blocks_)),
        shared_(params, words_, smem),
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
    if (scope_.whole) for_threads(mine, [&](int page) { indices()[first_ + page] = first_ + page; });
    if (rank_ != 0) return;
    for_threads(params_.group, [&](int i) { left_out()[i] = 0.f; });
    if (scope_.whole && threadIdx.x == 0) params_.counts[list_] = all;
  }

  __device__ void run() {
    if (scope_.whole) return;
    __syncthreads();
#pragma unroll 1
    for (int token = 0; token < scope_.q_len; ++token) add_token(token);
    compact();
  }

 private:
  // Where this block's bits begin, and the list's numbers.
  __device__ uint32_t* bits() const { return params_.bits + list_ * params_.words() + rank_ * words_; }
  __device__ int* indices() const { return params_.indices + list_ * params_.max_blocks; }
  __device__ float* left_out() const { return params_.left_out + list_ * params_.group; }

  __device__ void add_token(int index) {
    const Token token(scope_, params_.newest, index);
    if (!token.sees_any()) return;
    uint32_t cut = 0;
    if (token.counted > 0) {
      if (threadIdx.x == 0) search_.least = ~0u, search_.most = 0;
      // Fixed-point units by which all that may be dropped has 31 bits: pages of at most eps each.
      const float per_unit = 2147483648.f / fminf(1.f, float(token.counted) * params_.eps);
      const int64_t quad = (list_ * params_.max_seqlen_q + index) * quads_;
      fetch(params_.scores + quad * params_.max_blocks + first_, token.counted);
      add_masses(params_.tiles + quad * params_.tiles_of_list() * kHeads, token.counted);
      make_shares(token);
      cut = find_cut(token, uint32_t(params_.eps * per_unit), per_unit);
      if (rank_ == 0) {
        for_threads(params_.group,
                    [&](int i) { left_out()[i] = fmaxf(left_out()[i], float(shared_.base[i]) / per_unit); });
      }
    }
    // Of each 32 pages a warp makes one word.
    for_warps((min(end_, token.last_new + 1) - first_ + 31) / 32, [&](int word) {
      const int local = 32 * word + lane_, page = first_ + local;
      const bool listed = page <= token.last_new && (token.always(page) || ranks_[local] >= cut);
      const uint32_t set = __ballot_sync(~0u, listed);
      if (lane_ == 0) shared_.bits[word] |= set;
    });
    sync_blocks();  // all have read the ranks, and what the first block found
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
    const int count = (counted + kTile - 1) / kTile, heads = quads_ * kHeads;
    const int warps = kWarps / quads_, quad = warp_ / warps, warp = warp_ - quad * warps;
    if (quad < quads_) {
      Mass mass;
      const float2* of_quad = tiles + int64_t{quad} * params_.tiles_of_list() * kHeads;
#pragma unroll 4
      for (int i = warp * 32 + lane_; i < count * kHeads; i += warps * 32) mass.add(of_quad[i]);
#pragma unroll
      for (int step = kHeads; step < 32; step *= 2) {
        mass.add(make_float2(__shfl_xor_sync(~0u, mass.most, step), __shfl_xor_sync(~0u, mass.sum, step)));
      }
      if (lane_ < kHeads) shared_.partial[(quad * kHeads + lane_) * kWarps + warp] = make_float2(mass.most, mass.sum);
    }
    __syncthreads();
    for_warps(heads, [&](int head) {
      Mass mass;
      if (lane_ < warps) mass.add(shared_.partial[head * kWarps + lane_]);
      const float2 all = mass.of_warp();
      if (lane_ == 0) shared_.factors[head] = make_float2(all.x, all.y > 0.f ? 1.f / all.y : 1.f);
    });
    __syncthreads();
  }

  // Log-masses become shares of the mass of all pages; from these come the ranks: all ones where some head's mass isn't
  // finite. A quad is four heads side by side.
  __device__ void make_shares(const Token& token) {
    __pipeline_wait_prior(0);
    uint32_t least_rank = ~0u, most_rank = 0;
    for_threads(min(end_, token.counted) - first_, [&](int page) {
      float most = 0.f, least = 0.f;
#pragma unroll 1
      for (int quad = 0; quad < quads_; ++quad) {
        float4& here = shares_[int64_t{quad} * stride_ + page];
        float4 x = here;
        for_heads([&](int i) {
          const float2 factor = shared_.factors[quad * kHeads + i];
          float& of_head = at(x, i);
          const bool there = quad * kHeads + i < params_.group;
          of_head = !there ? 0.f : finite(of_head) ? exp2f(of_head - factor.x) * factor.y : kNotFinite;
          most = fmaxf(most, of_head);
          least = fminf(least, of_head);
        });
        here = x;
      }
      const uint32_t rank = least < 0.f ? ~0u : __float_as_uint(most);
      ranks_[page] = rank;
      if (token.always(first_ + page) || rank == ~0u) return;
      least_rank = min(least_rank, rank);
      most_rank = max(most_rank, rank);
    });
    least_rank = __reduce_min_sync(~0u, least_rank);
    most_rank = __reduce_max_sync(~0u, most_rank);
    if (lane_ == 0) {
      atomicMin(&search_.least, least_rank);
      atomicMax(&search_.most, most_rank);
    }
  }

  // The rank, as bits, from which on pages are listed; in the first block `base` is what each head drops.
  __device__ uint32_t find_cut(const Token& token, uint32_t budget, float per_unit) {
    const int group = params_.group;
    Search& search = first_block(search_);
    sync_blocks();
    if (rank_ == 0) {
      for_threads(group, [&](int i) { shared_.base[i] = 0; });
      if (threadIdx.x == 0) {
        uint32_t least = ~0u, most = 0;
        for (int block = 0; block < blocks_; ++block) {
          const Search& of_block = *cluster_.map_shared_rank(&search_, block);
          least = min(least, of_block.least);
          most = max(most, of_block.most);
        }
        search_.first_bin = 1;
        const uint32_t high = min(__float_as_uint(params_.eps), most) + 1;
        open_range(min(max(__float_as_uint(params_.eps / float(token.counted)), least), high - 1), high);
      }
    }
#pragma unroll 1
    while (true) {
      for_threads(group * kBins, [&](int i) { shared_.bins[i] = 0; });
      sync_blocks();
      count(token, search, per_unit);
      sync_blocks();
      if (rank_ == 0) narrow(budget);
      sync_blocks();
      if (search.done) break;
      collect(token, search, per_unit);
      sync_blocks();
      if (search.found <= kFew) {
        if (rank_ == 0) compare(budget);
        sync_blocks();
        break;
      }
    }
    return search.cut;
  }

  __device__ void open_range(uint32_t low, uint32_t high) {
    search_.low = low;
    search_.high = high;
    search_.shift = 0;
    while ((high - 1 - low) >> search_.shift >= kBins - search_.first_bin) ++search_.shift;
    search_.over = kBins;
    search_.found = 0;
  }

  // Adds up the shares of this block's ranks in [low, high) by bins of 2^shift; in the first range also those below,
  // which may be nearly all, and are added up by each thread for itself.
  __device__ void count(const Token& token, const Search& search, float per_unit) const {
    const uint32_t low = search.low, high = search.high;
    const int shift = search.shift, first_bin = search.first_bin, counted = min(end_, token.counted) - first_;
#pragma unroll 1
    for (int quad = 0; quad < quads_; ++quad) {
      uint32_t lowest[kHeads] = {};
      uint32_t* bins = shared_.bins + quad * kHeads * kBins;
      for_threads(counted, [&](int page) {
        const uint32_t rank = ranks_[page];
        if (token.always(first_ + page) || rank >= high || (rank < low && !first_bin)) return;
        float4 share = shares_[int64_t{quad} * stride_ + page];
        for_heads([&](int i) {
          const uint32_t units = __float2uint_rn(at(share, i) * per_unit);
          if (rank < low) {
            lowest[i] += units;
          } else if (units > 0) {
            atomicAdd(bins + i * kBins + int((rank - low) >> shift) + first_bin, units);
          }
        });
      });
      for_heads([&](int i) {
        const uint32_t sum = __reduce_add_sync(~0u, lowest[i]);
        if (lane_ == 0 && sum > 0) atomicAdd(bins + i * kBins, sum);
      });
    }
  }

  // From the bins of all blocks to the one in which the budget ends.
  __device__ void narrow(uint32_t budget) {
    if (blocks_ > 1) {
      for_threads(params_.group * kBins, [&](int i) {
        uint32_t sum = 0;
#pragma unroll
        for (int block = 0; block < kMaxCluster; ++block) {
          if (block < blocks_) sum += cluster_.map_shared_rank(shared_.bins, block)[i];
        }
        shared_.bins[i] = sum;
      });
      __syncthreads();
    }
    for_warps(params_.group, [&](int i) {
      const int bin = first_over(i, budget);
      if (lane_ == 0) atomicMin(&search_.over, bin);
    });
    __syncthreads();
    const int bin = search_.over;
    for_warps(params_.group, [&](int i) {
      const uint32_t sum = sum_before(i, bin);
      if (lane_ == 0) shared_.base[i] += sum;
    });
    __syncthreads();
    if (threadIdx.x != 0) return;
    const uint32_t low = search_.low + (uint32_t(bin - search_.first_bin) << search_.shift);
    search_.done = true;
    if (bin < search_.first_bin) {
      search_.cut = 0;  // rounding: the least that there is has too much
    } else if (bin == kBins) {
      search_.cut = search_.high;
    } else if (search_.shift == 0) {
      search_.cut = low;
    } else {
      search_.done = false;
      search_.first_bin = 0;
      open_range(low, min(search_.high, low + (1u << search_.shift)));
    }
  }

  // This block's pages of the range, to the first block.
  __device__ void collect(const Token& token, Search& search, float per_unit) const {
    uint32_t* few_ranks = &first_block(*shared_.few_ranks);
    uint32_t* few_units = &first_block(*shared_.few_units);
    for_threads(min(end_, token.counted) - first_, [&](int page) {
      const uint32_t rank = ranks_[page];
      if (token.always(first_ + page) || rank < search.low || rank >= search.high) return;
      const int place = atomicAdd(&search.found, 1);
      if (place >= kFew) return;
      few_ranks[place] = rank;
#pragma unroll 1
      for (int i = 0; i < params_.group; ++i) {
        const float4* quad = shares_ + int64_t{i / kHeads} * stride_ + page;
        few_units[place * params_.group + i] =
            __float2uint_rn(reinterpret_cast<const float*>(quad)[i % kHeads] * per_unit);
      }
    });
  }

  // A thread looks at each of the few pages: is what ranks as high and lower too much for any head? The cut is the
  // lowest rank for which it is, and base what is below that.
  __device__ void compare(uint32_t budget) {
    const int found = search_.found, group = params_.group;
    if (threadIdx.x == 0) search_.cut = search_.high;
    __syncthreads();
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
    for_warps(group, [&](int head) {
      uint32_t dropped = 0;
      for (int page = lane_; page < found; page += 32) {
        if (shared_.few_ranks[page] < search_.cut) dropped += shared_.few_units[page * group + head];
      }
      dropped = __reduce_add_sync(~0u, dropped);
      if (lane_ == 0) shared_.base[head] += dropped;
    });
    __syncthreads();
  }

  template <class T>
  __device__ T& first_block(T& here) const {
    return *cluster_.map_shared_rank(&here, 0);
  }
  __device__ void sync_blocks() const {
    if (blocks_ == 1) {
      __syncthreads();
    } else {
      cluster_.sync();
    }
  }

  // The first bin at whose end the head has dropped more than its budget; kBins where there is none.
  __device__ int first_over(int i, uint32_t budget) const {
    const uint32_t* bins = shared_.bins + i * kBins;
    uint32_t chunk = 0;  // sum of 32 bins: of chunk n in lane n
#pragma unroll 4
    for (int n = 0; n < kBins / 32; ++n) {
      const uint32_t sum = __reduce_add_sync(~0u, bins[n * 32 + lane_]);
      if (lane_ == n) chunk = sum;
    }
    const uint32_t up_to = shared_.base[i] + inclusive_sum(chunk);
    const uint32_t over = __ballot_sync(~0u, up_to > budget);
    if (over == 0) return kBins;
    const int first = __ffs(over) - 1;
    const uint32_t before = __shfl_sync(~0u, up_to - chunk, first);
    const uint32_t inside = before + inclusive_sum(bins[first * 32 + lane_]);
    return first * 32 + __ffs(__ballot_sync(~0u, inside > budget)) - 1;
  }

  __device__ uint32_t sum_before(int i, int bin) const {
    uint32_t sum = 0;
#pragma unroll 4
    for (int k = lane_; k < bin; k += 32) sum += shared_.bins[i * kBins + k];
    return __reduce_add_sync(~0u, sum);
  }

  // The bits, and indices and count from them.
  __device__ void compact() {
    const int words = min(words_, params_.words() - rank_ * words_);
    int count = 0;
    for_warps(1, [&](int) {
#pragma unroll 1
      for (int word = lane_; word < words; word += 32) count += __popc(shared_.bits[word]);
      count = __reduce_add_sync(~0u, count);
      if (lane_ == 0) *shared_.listed = count;
    });
    sync_blocks();
    int before = 0, total = 0;
#pragma unroll 1
    for (int block = 0; block < blocks_; ++block) {
      if (block == rank_) before = total;
      total += *cluster_.map_shared_rank(shared_.listed, block);
    }
    if (rank_ == 0 && threadIdx.x == 0) params_.counts[list_] = total;
#pragma unroll 1
    for (int first = 0; first < words; first += kThreads) {
      const int mine = first + threadIdx.x;
      const uint32_t set = mine < words ? shared_.bits[mine] : 0, listed = __popc(set);
      const uint32_t inclusive = inclusive_sum(listed);
      int* warp_counts = reinterpret_cast<int*>(shared_.bins);
      if (mine < words) bits()[mine] = set;
      if (lane_ == 31) warp_counts[warp_] = inclusive;
      __syncthreads();
      const int of_warp = lane_ < kWarps ? warp_counts[lane_] : 0;
      shared_.offsets[threadIdx.x] = before + __reduce_add_sync(~0u, lane_ < warp_ ? of_warp : 0) + inclusive - listed;
      before += __reduce_add_sync(~0u, of_warp);
      __syncthreads();
      for_warps(min(kThreads, words - first), [&](int word) {
        const uint32_t of_word = shared_.bits[first + word];
        if (of_word >> lane_ & 1) {
          indices()[shared_.offsets[word] + __popc(of_word & ((1u << lane_) - 1))] =
              first_ + (first + word) * 32 + lane_;
        }
      });
      __syncthreads();
    }
    sync_blocks();  // all have read this block's count
  }

  const SelectParams& params_;
  Search& search_;
  const cooperative_groups::cluster_group cluster_;
  const int blocks_, rank_;
  const int words_;  // of a block
  const Shared shared_;
  const Scope scope_;
  const int64_t list_;
  const int quads_, warp_, lane_;
  const int first_, end_;  // this block's pages
  // Of the present token and this block's pages: (quads, stride), and (pages). In shared memory where they fit, else
  // where the scores are.
  bool in_shared_;
  float4* shares_;
  uint32_t* ranks_;
  int stride_;
};

__global__ __launch_bounds__(kThreads, kBlocks) void cut_kernel(const __grid_constant__ SelectParams params) {
  extern __shared__ uint4 smem[];
  __shared__ Search search;
  // This kernel may begin when the blocks of the one before have waited. Where that was the score kernel, all but the
  // scores is there by now.
  if (!params.scores) wait_for_kernels_before();
  Cut cut(params, smem, search);
  cut.begin();
  if (params.scores) wait_for_kernels_before();
  let_next_kernel_wait();
  cut.run();
}

// Of a block's shared memory: what the launch asks for begins at the next multiple of 16.
constexpr int kSearchBytes = (int(sizeof(Search)) + 15) / 16 * 16;

// Few lists are shared among blocks until there is one for every multiprocessor.
int blocks_of_list(const SelectParams& params, int multiprocessors) {
  const int lists = params.batch * params.sketches.heads_k;
  int cluster = 1;
  while (2 * cluster <= kMaxCluster && 2 * cluster * lists <= multiprocessors &&
         params.max_blocks >= 2 * cluster * kLeastPages) {
    cluster *= 2;
  }
  return cluster;
}

}  // namespace

bool cut_fits(const SelectParams& params, int multiprocessors) {
  const int words = words_of_block(params.words(), blocks_of_list(params, multiprocessors));
  return Shared::bytes(params, words) + kSearchBytes <= kMaxSmem;
}

cudaError_t launch_cut(SelectParams params, int multiprocessors, cudaStream_t stream) {
  const int lists = params.batch * params.sketches.heads_k, cluster = blocks_of_list(params, multiprocessors);
  // Room beside the other blocks of a multiprocessor, unless there are too few blocks for all of them anyway. Of a
  // block's memory its Search takes a part, and the system 1 KiB more.
  const int words = words_of_block(params.words(), cluster);
  const int fixed = Shared::bytes(params, words);
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

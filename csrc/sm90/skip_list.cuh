// Skip lists (LiteAttention, arXiv 2511.11062): a KV tile that no row of a tile of queries found worth its exponentials
// is left out of the next call, before its keys are loaded.
//
// The planning warp, ListKeeper, reads the list of an item and leaves in shared memory which tiles to visit.
// Producers and consumers walk that, ListReader. Consumers vote, Ballot. When all of them have left the item the keeper
// strikes the tiles without a vote from the list, while others are at the next item already.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/softmax.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

// By their address in shared memory: through pointers, which come from a reference to all of it, accesses would be
// generic.
__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
__device__ inline void or_shared(uint32_t address, uint32_t bits) {
  asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}

// All KV tiles of an item. Walks go from the last tile to the first, so that masked tiles come first.
struct RangeWalk {
  // Of the item.
  __device__ int tiles(const Work& work) const { return work.n_end - work.n_begin; }
  // The tile after n; less than the item's first tile when there is none.
  __device__ int below(int n) const { return n - 1; }
};

// The visited ones. All lanes of a warp together.
class ListWalk {
 public:
  __device__ ListWalk(const uint32_t* visits, int tiles, const Work& work)
      : visits_(cute::cast_smem_ptr_to_uint(visits)),
        tiles_(tiles),
        n_begin_(work.n_begin),
        word_index_((work.n_end - 1) / 32) {
    word_ = load() & ~(1u << ((work.n_end - 1) % 32));
  }

  __device__ int tiles(const Work&) const { return tiles_; }

  __device__ int below(int n) {
    if (n <= n_begin_) return -1;
    while (word_ == 0) {  // ends, because tile n_begin is visited
      --word_index_;
      word_ = load();
    }
    const int bit = 31 - __clz(word_);
    word_ ^= 1u << bit;
    return word_index_ * 32 + bit;
  }

 private:
  // By a shuffle, for the reason that WorkRing::read gives.
  __device__ uint32_t load() const { return __shfl_sync(~0u, load_shared(visits_ + 4 * word_index_), 0); }

  uint32_t visits_;  // their address
  int tiles_, n_begin_, word_index_;
  uint32_t word_;
};

// Where one warp is in the ring of list buffers. `leave` follows on each `walk`, when the warp is done with the item.
template <class Traits, bool kUsed = Traits::kSkip>
class ListReader {
 public:
  using Walk = ListWalk;

  __device__ explicit ListReader(typename Traits::SharedStorage& smem) : lists_(smem.lists) {}

  __device__ Walk walk(const Work& work) const {
    return {lists_.visits[ring_.stage], __shfl_sync(~0u, lists_.items[ring_.stage].tiles, 0), work};
  }
  __device__ void leave() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) lists_.left[ring_.stage].arrive();
    ring_.advance();
  }
  __device__ uint32_t* votes() const { return lists_.votes[ring_.stage]; }
  __device__ float threshold() const { return lists_.items[ring_.stage].threshold; }

 private:
  using Storage = decltype(Traits::SharedStorage::lists);
  Storage& lists_;
  Ring<Storage::kBuffers> ring_;
};

template <class Traits>
class ListReader<Traits, false> {
 public:
  using Walk = RangeWalk;
  __device__ explicit ListReader(typename Traits::SharedStorage&) {}
  __device__ Walk walk(const Work&) const { return {}; }
  __device__ void leave() {}
};

// One warp's votes on the tiles of an item. A tile stays if in any row its largest score comes within the threshold, in
// log2, of the largest of all tiles before it.
template <class Traits, bool kUsed = Traits::kSkip>
class Ballot {
 public:
  __device__ explicit Ballot(const ListReader<Traits>& lists)
      : votes_(cute::cast_smem_ptr_to_uint(lists.votes())), threshold_(lists.threshold()) {}

  // Rows without a query: nothing comes near their max, and nobody reads their sums.
  template <class Softmax>
  __device__ static void exclude_unused(Softmax& softmax, const Rows& rows, const ThreadRows& thread_rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (thread_rows.row(i) >= rows.used) softmax.exclude(i);
    }
  }

  // On tile n, before the softmax knows of it. Its max lags behind the largest score by at most the slack, which
  // decides nearly all votes without an exchange between threads. Where a row sees nothing of the tile its distance is
  // -inf; what it sees first is far above all.
  template <class Softmax>
  __device__ void vote(int n, const float (&tile_max)[2], const Softmax& softmax) {
    constexpr float kRounding = 0.0625f;
    const float limit = threshold_ + Softmax::kShift;
    const float above = fmaxf(softmax.weight_log2(tile_max[0], 0), softmax.weight_log2(tile_max[1], 1));
    bool stays = __any_sync(~0u, above > limit + (Softmax::kSlack + kRounding));
    if (!stays && __any_sync(~0u, above > limit)) {
      bool close = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float largest = fmaxf(softmax.weight_log2(quad_max(softmax.largest[i]), i), float(Softmax::kShift));
        close = close || softmax.weight_log2(tile_max[i], i) - largest > threshold_;
      }
      stays = __any_sync(~0u, close);
    }
    stays_ = stays ? n : -1;
  }

  // The vote found last, at a time when nothing waits for this warp; at the latest before the list is left.
  __device__ void cast() {
    if (stays_ >= 0 && threadIdx.x % 32 == 0) or_shared(votes_ + stays_ / 32 * 4, 1u << (stays_ % 32));
    stays_ = -1;
  }

 private:
  uint32_t votes_;  // their address
  float threshold_;
  int stays_ = -1;  // the tile that does
};

template <class Traits>
class Ballot<Traits, false> {
 public:
  __device__ explicit Ballot(const ListReader<Traits>&) {}
  template <class Softmax>
  __device__ static void exclude_unused(Softmax&, const Rows&, const ThreadRows&) {}
  template <class Softmax>
  __device__ void vote(int, const float (&)[2], const Softmax&) const {}
  __device__ void cast() const {}
};

// The planning warp's side. All lanes call together.
template <class Traits, bool kUsed = Traits::kSkip>
class ListKeeper {
  using Storage = decltype(Traits::SharedStorage::lists);
  using Item = typename Storage::Item;

 public:
  // By one thread, before the block's first barrier.
  __device__ static void init(typename Traits::SharedStorage& smem) {
    for (int buffer = 0; buffer < Storage::kBuffers; ++buffer) {
      smem.lists.left[buffer].init(Traits::kConsumerThreads / 32 + Traits::kProducerWarps - 1);  // all but the keeper
    }
  }

  __device__ ListKeeper(const FwdParams& params, typename Traits::SharedStorage& smem)
      : list_(params.skip), lists_(smem.lists) {}

  // Waits for the buffer of the item to come, and brings the list of the one that had it up to date: what need not wait
  // for the next `open`.
  __device__ void make_room() { await(ring_.stage); }

  // Finds the tiles that `work` visits and narrows its range to the first and the last of them; to nothing where none
  // is visited.
  __device__ void open(Work& work) {
    if (work.n_begin >= work.n_end) return;
    const int buffer = ring_.stage, lane = threadIdx.x % 32;
    // A sequence longer than the list was made for is the caller's error, and must not be read past its end.
    const int word_begin = work.n_begin / 32;
    const int word_end = work.m_tile < list_.q_tiles ? min((work.n_end + 31) / 32, list_.words) : 0;
    uint32_t* row =
        list_.bits +
        ((int64_t{work.batch} * list_.num_heads + work.head_tile) * list_.q_tiles + work.m_tile) * list_.words;
    const float threshold = list_.threshold[work.head_tile * list_.threshold_stride];
    int lowest = INT_MAX, highest = -1, tiles = 0;
    for (int w = word_begin + lane; w < word_end; w += 32) {
      uint32_t bits = row[w];
      if (list_.must_do) bits |= list_.must_do[int64_t{work.batch} * list_.words + w];
      if (list_.must_skip) bits &= ~list_.must_skip[int64_t{work.batch} * list_.words + w];
      bits &= from(work.n_begin - w * 32) & ~from(work.n_end - w * 32);
      lists_.visits[buffer][w] = bits;
      lists_.votes[buffer][w] = 0;
      if (bits == 0) continue;
      tiles += __popc(bits);
      lowest = min(lowest, w * 32 + __ffs(bits) - 1);
      highest = w * 32 + 31 - __clz(bits);
    }
    work.n_begin = __reduce_min_sync(~0u, lowest);
    work.n_end = __reduce_max_sync(~0u, highest) + 1;
    tiles = __reduce_add_sync(~0u, tiles);
    if (work.n_end == 0) {
      work.n_begin = 0;
      return;
    }
    if (lane == 0) {
      Item& item = lists_.items[buffer];
      item.row = row;
      item.word_begin = word_begin;
      item.word_end = word_end;
      item.first = work.n_end - 1;
      item.tiles = tiles;
      item.threshold = threshold;
    }
    __syncwarp();
    taken_ |= 1u << buffer;
    ring_.advance();
  }

  // After the last item.
  __device__ void close() {
    for (int i = 0; i < Storage::kBuffers; ++i) {
      await(ring_.stage);
      ring_.advance();
    }
  }

 private:
  // Bits b and up, of 32.
  __device__ static uint32_t from(int b) { return b <= 0 ? ~0u : b >= 32 ? 0u : ~0u << b; }

  // Waits until the buffer's item is done, and brings its list up to date.
  __device__ void await(int buffer) {
    lists_.left[buffer].wait(ring_.phase ^ 1);
    const bool held = taken_ >> buffer & 1;
    taken_ &= ~(1u << buffer);
    if (!held || !list_.update) return;
    const Item item = lists_.items[buffer];
    for (int w = item.word_begin + threadIdx.x % 32; w < item.word_end; w += 32) {
      uint32_t voted = lists_.votes[buffer][w];
      if (item.first / 32 == w) voted |= 1u << (item.first % 32);  // nothing came before it to be measured against
      // No answer is waited for.
      if (uint32_t gone = lists_.visits[buffer][w] & ~voted) atomicAnd(item.row + w, ~gone);
      if (list_.must_do && voted) atomicOr(item.row + w, voted);  // struck before and visited all the same
    }
    __syncwarp();
  }

  const SkipList& list_;
  Storage& lists_;
  Ring<Storage::kBuffers> ring_;
  uint32_t taken_ = 0;  // one bit a buffer: it holds an item whose list is to be brought up to date
};

template <class Traits>
class ListKeeper<Traits, false> {
 public:
  __device__ ListKeeper(const FwdParams&, typename Traits::SharedStorage&) {}
  __device__ void make_room() {}
  __device__ void open(Work&) {}
  __device__ void close() {}
};

}  // namespace lite_attention::sm90

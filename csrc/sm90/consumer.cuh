// The consumer warpgroups: QK, score modifications, mask, softmax, PV. Each owns 64 rows of the tile of queries.
//
// Two overlaps hide the softmax (FlashAttention-3, arXiv 2407.08608): inside a warpgroup QK of the next KV tile is
// issued before PV of this one, and the softmax of the next runs under it; between warpgroups, turns at the tensor
// cores let one compute exponentials while another multiplies. Both reach across the border between two work items.
#pragma once

#include "sm90/descale.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/mask.cuh"
#include "sm90/mma.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/score_mod.cuh"
#include "sm90/skip_list.cuh"
#include "sm90/softmax.cuh"

namespace lite_attention::sm90 {

// Warpgroups issue their products in turn, round robin. A named barrier of two warpgroups passes the turn from one to
// the next.
template <class Traits>
struct Turn {
  static constexpr bool kUsed = Traits::kConsumerWarpgroups > 1;
  int warpgroup;

  __device__ explicit Turn(int warpgroup) : warpgroup(warpgroup) {
    if (kUsed && warpgroup == Traits::kConsumerWarpgroups - 1) pass();
  }
  __device__ void wait() const {
    if constexpr (kUsed) cutlass::arch::NamedBarrier::sync(256, kTurn + warpgroup);
  }
  __device__ void pass() const {
    if constexpr (kUsed)
      cutlass::arch::NamedBarrier::arrive(256, kTurn + (warpgroup + 1) % Traits::kConsumerWarpgroups);
  }
};

// 0 * NaN is NaN: probabilities of masked keys are zero, but rows of V that nobody wrote may hold anything, so they are
// zeroed before PV reads them. Every warpgroup zeroes all such rows for itself, which needs no barrier between
// warpgroups. Costly, so only where TMA did not read zeros there: Consumer::zeros_follow.
template <class Traits>
__device__ void zero_rows(typename Traits::Value* v_stage, int begin, int end) {
  constexpr int kVectors = Traits::kRowBytes / 16, kRowsAtOnce = 128 / kVectors;
  const int thread = threadIdx.x % 128;
  auto* vectors = reinterpret_cast<uint4*>(v_stage) + thread;
#pragma unroll 1
  for (int first = begin; first < end; first += kRowsAtOnce) {  // the same for all threads
    if (first + thread / kVectors >= end) continue;
#pragma unroll
    for (int slab = 0; slab < Traits::kSlabs; ++slab) {
      vectors[(slab * Traits::kBlockN + first) * kVectors] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, kWarpgroup + threadIdx.x / 128 - 1);
}

// A condition that ptxas must know where this stands, and not where it is needed.
__device__ inline bool pinned(bool condition) {
  int value = condition;
  asm volatile("" : "+r"(value));
  return value != 0;
}

// A work item as one warpgroup sees it.
template <class Traits>
struct Item {
  Work work;
  Rows rows;
  Mask mask;
  Descales<Traits> descales;
  ScoreModifier<Traits::kScoreMod> modifier;
  typename ListReader<Traits>::Walk walk;
  Ballot<Traits> ballot;
  int n;     // the KV tile at hand
  int next;  // the one after it, less than the first one where there is none: known after look_ahead()

  __device__ Item(const FwdParams& params, const Work& work, const ThreadRows& thread_rows,
                  const ListReader<Traits>& lists, int warpgroup)
      : work(work),
        rows(params.packing, work.seq, work.m_tile, first_warpgroup<Traits>() + warpgroup),
        mask(params.lengths, work.seq, rows, Traits::kBlockN),
        descales(params, work),
        modifier(params, score_scale(params), work.seq, rows, thread_rows, work.batch,
                 work.head_tile * params.packing.pack),
        walk(lists.walk(work)),
        ballot(lists),
        n(work.n_end - 1) {}

  __device__ float score_scale(const FwdParams& params) const { return params.softmax_scale * descales.scores(); }
  __device__ bool end() const { return work.parts == 0; }
  __device__ bool no_keys() const { return work.n_begin >= work.n_end; }
  __device__ bool computed() const { return !no_keys() && rows.used > 0; }
  __device__ bool last_tile() const { return n <= work.n_begin; }
  // Whether the tile at hand is the last one.
  __device__ bool look_ahead() {
    next = walk.below(n);
    return last_tile();
  }
  // The item's tiles are those that any row of the cluster sees; these rows may not see the last ones.
  __device__ bool blind() const { return n >= mask.tiles_end && !last_tile(); }
  __device__ void go_on() { n = walk.below(n); }
};

// One consumer warpgroup over all work of its block. Every KV tile takes a turn at the tensor cores, computed or not.
//
// PV of an item's last tile is put off until QK of the next item's first tile has been issued, so that the softmax of
// the one runs under the products of the other: they are joined, and the output is stored after that of the second
// tile has been issued. They are not where an item has several parts, whose
// sums other blocks wait for, or where a warpgroup sees nothing of the next item's first tile.
//
// Loops and branches around the products must be the same for a whole warp, visibly to ptxas: after one that it can't
// prove so it keeps ring stages and descriptors in vector registers, and every wgmma waits for them to be moved. Hence
// the shuffles in WorkRing and Epilogue, and loops there that end for all lanes together.
template <class Traits>
class Consumer {
  using Value = typename Traits::Value;
  using EmptyBarrier = typename Traits::EmptyBarrier;
  using Softmax = OnlineSoftmax<Value, Traits::kProbabilityShift>;
  static constexpr int kBlockN = Traits::kBlockN;
  // One warpgroup has few whole items, and starts sooner with less code.
  static constexpr bool kJoins = Traits::kConsumerWarpgroups > 1;
  enum Border { kJoined = 1, kUnsaved = 2 };  // the tile at hand is an item's first; the output is the item before's

 public:
  __device__ Consumer(const FwdParams& params, typename Traits::SharedStorage& smem)
      : params_(params),
        smem_(smem),
        warpgroup_(cutlass::canonical_warp_group_idx() - 1),
        lane_(threadIdx.x % 32),
        thread_rows_(params.packing),
        ring_work_(smem),
        lists_(smem),
        turn_(warpgroup_) {}

  __device__ __forceinline__ void run() {
    typename Traits::MmaQK mma_qk;
    typename Traits::MmaPV mma_pv;
    auto thread_qk = mma_qk.get_slice(warpgroup_ * 128);
    auto thread_pv = mma_pv.get_slice(warpgroup_ * 128);
    Tensor rQ = thread_qk.partition_fragment_A(make_tensor(make_smem_ptr(smem_.q), typename Traits::SmemLayoutQ{}));
    Tensor rK = thread_qk.partition_fragment_B(make_tensor(make_smem_ptr(smem_.k), typename Traits::SmemLayoutK{}));
    Tensor rV = thread_pv.partition_fragment_B(make_tensor(make_smem_ptr(values()), typename Traits::SmemLayoutVt{}));
    Tensor scores = partition_fragment_C(mma_qk, cute::Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
    Tensor output = partition_fragment_C(mma_pv, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
    Tensor probs = make_operand<Value>(scores);
    Softmax softmax(0.f);
    float value_scale = 1.f;  // of the item that the output belongs to
    float rescale[2];

    auto issue_qk = [&]() __attribute__((always_inline)) {
      // Zero for each stage, but not for ptxas: it would keep a descriptor for every k block of Q in uniform registers,
      // for want of which others would be moved there before each product.
      const int nothing = ring_k_.stage >> 8;
      Tensor q = make_tensor(rQ.data() + nothing, rQ.layout());
      gemm_async(mma_qk, q, rK(_, _, _, ring_k_.stage), scores, GMMA::ScaleOut::Zero);
    };
    bool fresh = true;  // the item at hand has no output yet
    auto issue_pv = [&]() __attribute__((always_inline)) {
      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      const auto first = fresh ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
      gemm_async(mma_pv, probs, rV(_, _, _, ring_v_.stage), output, first);
      fresh = false;
    };
    auto scale_output = [&](const float (&factor)[2]) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < size(output); ++i) output(i) *= factor[i / 2 % 2];
    };
    // What is known of an item's rows when its last probabilities are. Kept in shared memory, not in registers during
    // the next item's first tile.
    auto finish_rows = [&]() __attribute__((always_inline)) {
      float normalise[2], lse[2];
      softmax.finish(normalise, lse);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane_ % 4 == 0) finished(i) = make_float2(normalise[i] * value_scale, lse[i]);
      }
      __syncwarp();
    };
    auto normalise = [&]() __attribute__((always_inline)) {
      const float factor[2] = {finished(0).x, finished(1).x};
      scale_output(factor);
    };
    // The oldest item's output, when its last PV is done.
    auto store = [&](auto may_be_part) __attribute__((always_inline)) {
      const Work done = ring_work_.oldest();
      const Rows rows(params_.packing, done.seq, done.m_tile, first_warpgroup<Traits>() + warpgroup_);
      const Epilogue<Traits> epilogue(params_, smem_, done, rows, thread_rows_);
      const float lse[2] = {finished(0).y, finished(1).y};
      if constexpr (decltype(may_be_part)::value) {
        epilogue.store(output, lse);
      } else {
        epilogue.store_final(output, lse);
      }
      ring_work_.release();
    };
    auto await_keys = [&]() __attribute__((always_inline)) { smem_.k_full[ring_k_.stage].wait(ring_k_.phase); };
    // A tile's scores to probabilities. The tensor cores work for the other warpgroups meanwhile and soon wait for this
    // one, so what stands between QK and the next turn counts: the stage of K is released when the maxima are under
    // way, and the next K, which has long arrived, is waited for before the exponentials, because ptxas moves the wait
    // for PV up to the last branch before it, and a branch after them would keep sums from going along.
    auto weigh = [&](Item<Traits>& item, bool last, bool masked) __attribute__((always_inline)) {
      item.modifier.template apply<kBlockN>(scores, item.n, lane_);
      if (masked) item.mask.template apply<kBlockN>(scores, item.n, thread_rows_);
      float high[2];
      softmax.tile_max(scores, high);
      release_k();
      if (last) release_q();
      const bool moved = softmax.moves(high);
      item.ballot.vote(item.n, high, softmax);
      softmax.advance(high, moved, rescale);
      if (!last) await_keys();
      softmax.exponentiate(scores);
      return moved;
    };
    auto start_rows = [&](Item<Traits>& item) __attribute__((always_inline)) {
      softmax = Softmax(ScoreModifier<Traits::kScoreMod>::softmax_scale(item.score_scale(params_)));
      value_scale = item.descales.values();
      item.ballot.exclude_unused(softmax, item.rows, thread_rows_);
    };
    auto await_queries = [&]() __attribute__((always_inline)) {
      smem_.q_full[warpgroup_].wait(q_phase_);
      q_phase_ ^= 1;
      await_keys();
    };
    // Of the tile at the keys' end, before PV reads it.
    auto zero_end = [&](const Item<Traits>& item) __attribute__((always_inline)) {
      if (int end = item.mask.seqlen_k - item.n * kBlockN; end < kBlockN && !zeros_follow()) {
        smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
        zero_rows<Traits>(v_stage(), end, kBlockN);
      }
    };
    // An item's first tile where nothing is pending.
    auto begin = [&](Item<Traits>& item) __attribute__((always_inline)) {
      await_queries();
      turn_.wait();
      issue_qk();
      turn_.pass();
      start_rows(item);
      const bool last = item.look_ahead();
      softmax.set_limits();
      gemm_wait<0>(scores);
      weigh(item, last, item.mask.needed(item.n));
      to_operand(scores, probs);
      fresh = true;
      zero_end(item);
      return last;
    };
    // Any other tile, whose K has arrived, beside PV of the one before. Where that was the last of the item before the
    // output stays in place, unsaved, until QK of yet another tile is on its way, so that it is stored under a product.
    // All tiles go through one copy of the code: what runs once in an item is not in the instruction cache.
    int border = 0;  // bits of Border
    auto step = [&](Item<Traits>& item) __attribute__((always_inline)) {
      bool passed = false;
      turn_.wait();
      issue_qk();
      if (kJoins && border) {
        turn_.pass();
        passed = true;
        if (border & kUnsaved) store(false_type{});
        border &= kJoined;
        if (border) {
          finish_rows();
          start_rows(item);
        }
      }
      issue_pv();
      if (!passed) turn_.pass();
      item.ballot.cast();
      // Found while QK runs, for the same reason.
      const bool last = pinned(item.look_ahead()), masked = pinned(item.mask.needed(item.n));
      softmax.set_limits();
      gemm_wait<1>(scores);
      const bool moved = weigh(item, last, masked);
      warpgroup_fence_operand(scores);
      gemm_wait<0>(output);
      release_v();
      to_operand(scores, probs);  // here, so that it goes along with the exponentials
      if (moved || (kJoins && border)) {
        if (kJoins && border) {
          rescale[0] = finished(0).x;
          rescale[1] = finished(1).x;
          zero_end(item);
          border = kUnsaved;
          fresh = true;
        }
        scale_output(rescale);
      }
      return last;
    };

    auto next_item = [&]() __attribute__((always_inline)) {
      return Item<Traits>(params_, ring_work_.get(), thread_rows_, lists_, warpgroup_);
    };
    // When the walk through an item's tiles is over.
    auto leave = [&](Item<Traits>& item) __attribute__((always_inline)) {
      item.ballot.cast();
      lists_.leave();
      if (int begin = item.mask.first_valid - item.work.n_begin * kBlockN; begin > 0) {
        smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
        zero_rows<Traits>(v_stage(), 0, begin);
      }
    };

    // What is pending, the last PV of an item, is where the control flow is, and not in a variable: for ptxas the
    // accumulators would be needed throughout the sums of parts, where there is use for their registers.
    Item<Traits> item = next_item();
    while (true) {
      for (; !item.end() && !item.computed(); item = next_item()) pass_by(item);
      if (item.end()) break;
      for (; item.blind(); item.go_on()) pass_by_tile();
      bool last = begin(item);
      while (true) {
        if (last) {
          leave(item);
          const bool whole = Traits::kSkip || item.work.parts == 1;
          item = next_item();
          if (!(kJoins && whole && !item.end() && item.computed() && !item.blind())) break;
          await_queries();
          border |= kJoined;
        } else {
          item.n = item.next;
        }
        last = step(item);
      }
      if (kJoins && border) {
        store(false_type{});
        border = 0;
      }
      issue_pv();
      finish_rows();
      gemm_wait<0>(output);
      release_v();
      normalise();
      store(true_type{});
    }
  }

 private:
  // Keeps rings and turns moving over an item without queries for this warpgroup, or without keys.
  __device__ void pass_by(Item<Traits>& item) {
    const Epilogue<Traits> epilogue(params_, smem_, item.work, item.rows, thread_rows_);
    if (item.no_keys()) {
      epilogue.store_nothing_seen();
    } else {
      for (; item.n >= item.work.n_begin; item.go_on()) pass_by_tile();
      lists_.leave();
      if (!Traits::kSkip && item.work.parts > 1) epilogue.store_no_part();
    }
    ring_work_.release();
  }

  __device__ void pass_by_tile() {
    turn_.wait();
    turn_.pass();
    smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
    release_k();
    smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
    release_v();
  }

  // Tells the producers of all blocks of the cluster, each of which writes to every block.
  __device__ void release(EmptyBarrier& barrier) const {
    if (lane_ < Traits::kCluster) Cluster<Traits::kCluster>::arrive(barrier, lane_);
  }
  __device__ void release_q() const {
    if (lane_ == 0) smem_.q_empty[warpgroup_].arrive();
  }
  __device__ void release_k() {
    release(smem_.k_empty[ring_k_.stage]);
    ring_k_.advance();
  }
  __device__ void release_v() {
    release(smem_.v_empty[ring_v_.stage]);
    ring_v_.advance();
  }
  // Whether a sequence's keys end where their tensor does, past which TMA reads zeros.
  __device__ bool zeros_follow() const { return params_.k_has_batch && !params_.lengths.seqused_k; }
  __device__ float2& finished(int i) const {
    return smem_.finished[warpgroup_ * kRowsPerWarpgroup + ThreadRows::row(i)];
  }
  __device__ Value* values() const { return reinterpret_cast<Value*>(smem_.v); }
  __device__ Value* v_stage() const { return values() + ring_v_.stage * kBlockN * Traits::kHeadDim; }

  const FwdParams& params_;
  typename Traits::SharedStorage& smem_;
  const int warpgroup_, lane_;
  const ThreadRows thread_rows_;
  WorkRing<Traits> ring_work_;
  ListReader<Traits> lists_;
  Turn<Traits> turn_;
  Ring<Traits::kKeyStages> ring_k_;
  Ring<Traits::kStages> ring_v_;
  uint32_t q_phase_ = 0;
};

}  // namespace lite_attention::sm90

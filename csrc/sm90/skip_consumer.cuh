// The consumer warpgroups of kernels with skip lists: what consumer.cuh does over the visited tiles, and votes on them.
//
// Few tiles an item make its beginning and its end count. So PV of an item's last tile is put off until QK of the next
// item's first tile has been issued, and the softmax of the one runs under the products of the other.
#pragma once

#include "sm90/consumer.cuh"
#include "sm90/skip_list.cuh"

namespace lite_attention::sm90 {

// A work item as one warpgroup sees it.
template <class Traits>
struct SkipItem {
  Work work;
  Rows rows;
  Mask mask;
  ListWalk walk;
  Ballot<Traits> ballot;
  int n;  // the KV tile at hand

  __device__ SkipItem(const FwdParams& params, const Work& work, const ListReader<Traits>& lists, int warpgroup)
      : work(work),
        rows(params.packing, work.seq, work.m_tile, warpgroup),
        mask(params.lengths, work.seq, rows, Traits::kBlockN),
        walk(lists.walk(work)),
        ballot(lists),
        n(work.n_end - 1) {}

  __device__ bool end() const { return work.parts == 0; }
  __device__ bool computed() const { return work.n_begin < work.n_end && rows.used > 0; }
  __device__ bool last_tile() const { return n <= work.n_begin; }
  // The item's tiles are those that any row of the block sees; these rows may not see the last ones.
  __device__ bool blind() const { return n >= mask.tiles_end && !last_tile(); }
  __device__ void go_on() { n = walk.below(n); }
};

// One consumer warpgroup over all work of its block. Every KV tile takes a turn at the tensor cores, computed or not.
//
// Loops and branches around the products must be the same for a whole warp, visibly to ptxas: after one that it can't
// prove so it keeps ring stages and descriptors in vector registers, and every wgmma waits for them to be moved.
template <class Traits>
class SkipConsumer {
  using Element = typename Traits::Element;
  static constexpr int kBlockN = Traits::kBlockN;
  using Softmax = OnlineSoftmax<typename Traits::Value, true, 0>;

 public:
  __device__ SkipConsumer(const FwdParams& params, typename Traits::SharedStorage& smem)
      : params_(params),
        smem_(smem),
        warpgroup_(cutlass::canonical_warp_group_idx() - 1),
        lane_(threadIdx.x % 32),
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
    Tensor rV = thread_pv.partition_fragment_B(make_tensor(make_smem_ptr(smem_.v), typename Traits::SmemLayoutVt{}));
    Tensor scores = partition_fragment_C(mma_qk, cute::Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
    Tensor output = partition_fragment_C(mma_pv, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
    Tensor probs = make_operand<Element>(scores);
    Softmax softmax(params_.softmax_scale);
    float rescale[2], normalise[2], lse[2];

    auto issue_qk = [&]() __attribute__((always_inline)) {
      gemm_async<GMMA::ScaleOut::Zero>(mma_qk, rQ, rK(_, _, _, ring_k_.stage), scores);
    };
    auto issue_pv = [&]() __attribute__((always_inline)) {
      gemm_async<GMMA::ScaleOut::One>(mma_pv, probs, rV(_, _, _, ring_v_.stage), output);
    };
    auto scale_output = [&](const float (&factor)[2]) __attribute__((always_inline)) {
#pragma unroll
      for (int i = 0; i < size(output); ++i) output(i) *= factor[i / 2 % 2];
    };
    // A tile's scores to probabilities. Before the exponentials is the time to see to it that the next K has arrived: a
    // branch after them would keep ptxas from adding up probabilities in their shadow.
    auto weigh = [&](SkipItem<Traits>& item) __attribute__((always_inline)) {
      float high[2];
      softmax.tile_max(scores, high);
      item.ballot.vote(item.n, high, softmax);
      const bool moved = softmax.advance(high, rescale);
      if (!item.last_tile()) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
      softmax.exponentiate(scores);
      return moved;
    };
    // One KV tile, whose K has arrived.
    auto step = [&](SkipItem<Traits>& item, auto masked) __attribute__((always_inline)) {
      turn_.wait();
      issue_qk();
      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      issue_pv();
      turn_.pass();
      gemm_wait<1>(scores);
      release_k();
      if (item.last_tile()) release_q();
      if constexpr (decltype(masked)::value) item.mask.template apply<kBlockN>(scores, item.n, lane_);
      const bool moved = weigh(item);
      warpgroup_fence_operand(scores);
      gemm_wait<0>(output);
      release_v();
      if (moved) scale_output(rescale);
      to_operand(scores, probs);
    };

    bool pending = false;  // PV of the last tile of `done` is still to be issued
    Work done;
    while (true) {
      SkipItem<Traits> item(params_, ring_work_.get(), lists_, warpgroup_);
      const bool computed = !item.end() && item.computed();
      bool begins;
      do {
        // Blind tiles pass faster than others can compute them: what is pending must not wait for the first seen one.
        begins = computed && !(pending && item.blind());
        if (begins) {
          for (; item.blind(); item.go_on()) pass_by_tile();
          smem_.q_full[warpgroup_].wait(q_phase_);
          q_phase_ ^= 1;
          smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
          turn_.wait();
        }
        if (begins || pending) {
          // Both whether wanted or not, from whatever the stages hold: products under a branch would be serialised.
          issue_qk();
          issue_pv();
          if (begins) turn_.pass();
          softmax.finish(params_.softmax_scale, normalise, lse);
          softmax = Softmax(params_.softmax_scale);
          gemm_wait<1>(scores);
          if (begins) {
            release_k();
            if (item.last_tile()) release_q();
            item.ballot.exclude_unused(softmax, item.rows);
            if (item.mask.needed(item.n)) item.mask.template apply<kBlockN>(scores, item.n, lane_);
            weigh(item);
          }
          warpgroup_fence_operand(scores);
          gemm_wait<0>(output);
          if (pending) {
            release_v();
            scale_output(normalise);
            const Rows rows(params_.packing, done.seq, done.m_tile, warpgroup_);
            Epilogue<Traits>(params_, smem_, done, rows).store_final(output, lse);
          }
        }
        pending = false;
      } while (computed && !begins);
      if (!computed) {
        if (item.end()) break;
        pass_by(item);
        continue;
      }
      to_operand(scores, probs);
      clear(output);
      if (int end = item.mask.seqlen_k - item.n * kBlockN; end < kBlockN) {
        smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
        zero_rows<Traits>(v_stage(), end, kBlockN);
      }
      // From the last tile to the first: the diagonal and the keys' end, the tiles that all rows see, the left edge of
      // a window.
      const int n_begin = item.work.n_begin;
      for (item.go_on(); item.n >= max(n_begin, item.mask.clean_end); item.go_on()) step(item, true_type{});
      for (; item.n >= max(n_begin, item.mask.clean_begin); item.go_on()) step(item, false_type{});
      for (; item.n >= n_begin; item.go_on()) step(item, true_type{});
      lists_.leave();

      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      if (int begin = item.mask.first_valid - n_begin * kBlockN; begin > 0) zero_rows<Traits>(v_stage(), 0, begin);
      pending = true;
      done = item.work;
    }
  }

 private:
  // Keeps rings and turns moving over an item without queries for this warpgroup, or without a tile to visit.
  __device__ void pass_by(SkipItem<Traits>& item) {
    if (item.work.n_begin >= item.work.n_end) {
      Epilogue<Traits>(params_, smem_, item.work, item.rows).store_nothing_seen_by_warps();
      return;
    }
    for (; item.n >= item.work.n_begin; item.go_on()) pass_by_tile();
    lists_.leave();
  }

  __device__ void pass_by_tile() {
    turn_.wait();
    turn_.pass();
    smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
    release_k();
    smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
    release_v();
  }

  __device__ void release(typename Traits::EmptyBarrier& barrier) const {
    if (lane_ == 0) barrier.arrive();
  }
  __device__ void release_q() const { release(smem_.q_empty[warpgroup_]); }
  __device__ void release_k() {
    release(smem_.k_empty[ring_k_.stage]);
    ring_k_.advance();
  }
  __device__ void release_v() {
    release(smem_.v_empty[ring_v_.stage]);
    ring_v_.advance();
  }
  __device__ Element* v_stage() const { return smem_.v + ring_v_.stage * kBlockN * Traits::kHeadDim; }

  const FwdParams& params_;
  typename Traits::SharedStorage& smem_;
  const int warpgroup_, lane_;
  WorkRing<Traits> ring_work_;
  ListReader<Traits> lists_;
  Turn<Traits> turn_;
  Ring<Traits::kStages> ring_k_, ring_v_;
  uint32_t q_phase_ = 0;
};

}  // namespace lite_attention::sm90

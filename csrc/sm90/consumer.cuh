// The consumer warpgroups: QK, score modifications, mask, softmax, PV. Each owns 64 rows of the tile of queries.
//
// Two overlaps hide the softmax (FlashAttention-3, arXiv 2407.08608): inside a warpgroup QK of the next KV tile is
// issued before PV of this one, and the softmax of the next runs under it; between warpgroups, turns at the tensor
// cores let one compute exponentials while another multiplies.
#pragma once

#include "sm90/descale.cuh"
#include "sm90/epilogue.cuh"
#include "sm90/mask.cuh"
#include "sm90/mma.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/rows.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/score_mod.cuh"
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
// warpgroups.
template <class Traits>
__device__ void zero_rows(typename Traits::Value* v_stage, int begin, int end) {
  constexpr int kVectors = Traits::kRowBytes / 16;
  auto* vectors = reinterpret_cast<uint4*>(v_stage);
  for (int i = threadIdx.x % 128; i < Traits::kBlockN * Traits::kSlabs * kVectors; i += 128) {
    int row = i / kVectors % Traits::kBlockN;
    if (row >= begin && row < end) vectors[i] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, kWarpgroup + threadIdx.x / 128 - 1);
}

// One consumer warpgroup over all work of its block.
template <class Traits>
class Consumer {
  using Value = typename Traits::Value;
  using EmptyBarrier = typename Traits::EmptyBarrier;
  using Modifier = ScoreModifier<Traits::kScoreMod>;

 public:
  __device__ Consumer(const FwdParams& params, typename Traits::SharedStorage& smem)
      : params_(params),
        smem_(smem),
        warpgroup_(cutlass::canonical_warp_group_idx() - 1),
        lane_(threadIdx.x % 32),
        turn_(warpgroup_) {}

  __device__ void run() {
    WorkRing<Traits> ring_work(smem_);
    while (true) {
      const Work work = ring_work.get();
      if (work.parts == 0) break;
      const Rows rows(params_.packing, work.seq, work.m_tile, first_warpgroup<Traits>() + warpgroup_);
      if (work.n_begin >= work.n_end) {
        Epilogue<Traits>(params_, smem_, work, rows).store_nothing_seen();
      } else if (rows.used > 0) {
        attend(work, rows);
      } else {
        pass_by(work, work.n_end, work.n_begin);
        if (work.parts > 1) Epilogue<Traits>(params_, smem_, work, rows).store_no_part();
      }
    }
  }

 private:
  __device__ void attend(const Work& work, const Rows& rows) {
    typename Traits::MmaQK mma_qk;
    typename Traits::MmaPV mma_pv;
    auto thread_qk = mma_qk.get_slice(warpgroup_ * 128);
    auto thread_pv = mma_pv.get_slice(warpgroup_ * 128);
    Tensor rQ = thread_qk.partition_fragment_A(make_tensor(make_smem_ptr(smem_.q), typename Traits::SmemLayoutQ{}));
    Tensor rK = thread_qk.partition_fragment_B(make_tensor(make_smem_ptr(smem_.k), typename Traits::SmemLayoutK{}));
    Tensor rV = thread_pv.partition_fragment_B(make_tensor(make_smem_ptr(values()), typename Traits::SmemLayoutVt{}));
    Tensor scores = partition_fragment_C(mma_qk, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>{});
    Tensor output = partition_fragment_C(mma_pv, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});

    const Mask mask(params_.lengths, work.seq, rows, Traits::kBlockN);
    const Descales<Traits> descales(params_, work);
    const float scale = params_.softmax_scale * descales.k();
    const Modifier modifier(params_, scale, work.seq, rows, work.batch, work.head_tile * params_.packing.pack);
    const float softmax_scale = Modifier::softmax_scale(scale);
    OnlineSoftmax<Value, false, Traits::kProbabilityShift> softmax(softmax_scale);
    float rescale[2];

    smem_.q_full[warpgroup_].wait(q_phase_);
    q_phase_ ^= 1;
    // The item's tiles are those that any row of the cluster sees; its first rows may not see the last tiles.
    const int n_end = max(work.n_begin + 1, min(work.n_end, mask.tiles_end));
    pass_by(work, work.n_end, n_end);
    int n = n_end - 1;
    if (n_end < work.n_end) take_turn();

    smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
    gemm_async<GMMA::ScaleOut::Zero>(mma_qk, rQ, rK(_, _, _, ring_k_.stage), scores);
    gemm_wait<0>(scores);
    release_k();
    modifier.template apply<Traits::kBlockN>(scores, n, lane_);
    if (mask.needed(n)) mask.template apply<Traits::kBlockN>(scores, n, lane_);
    softmax.step(scores, rescale);
    Tensor probs = make_operand<Value>(scores);
    to_operand(scores, probs);
    clear(output);
    if (int end = mask.seqlen_k - n * Traits::kBlockN; end < Traits::kBlockN) {
      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      zero_rows<Traits>(v_stage(), end, Traits::kBlockN);
    }

    // One KV tile, whose K has arrived. Waiting for the next K stands between the softmax and the wait for PV for a
    // reason: with no branch there, ptxas hoists that wait above the exponentials, and nothing overlaps.
    auto step = [&](int n, auto masked) __attribute__((always_inline)) {
      turn_.wait();
      gemm_async<GMMA::ScaleOut::Zero>(mma_qk, rQ, rK(_, _, _, ring_k_.stage), scores);
      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      gemm_async<GMMA::ScaleOut::One>(mma_pv, probs, rV(_, _, _, ring_v_.stage), output);
      turn_.pass();
      gemm_wait<1>(scores);
      release_k();
      modifier.template apply<Traits::kBlockN>(scores, n, lane_);
      if constexpr (decltype(masked)::value) mask.template apply<Traits::kBlockN>(scores, n, lane_);
      const bool moved = softmax.step(scores, rescale);
      warpgroup_fence_operand(scores);
      if (n > work.n_begin) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
      gemm_wait<0>(output);
      release_v();
      if (moved) {
#pragma unroll
        for (int i = 0; i < size(output); ++i) output(i) *= rescale[i / 2 % 2];
      }
      to_operand(scores, probs);
    };
    if (n > work.n_begin) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
    // From the last tile to the first: the diagonal and the keys' end, the tiles that all rows see, the left edge of a
    // window.
    for (--n; n >= max(work.n_begin, mask.clean_end); --n) step(n, true_type{});
    for (; n >= max(work.n_begin, mask.clean_begin); --n) step(n, false_type{});
    for (; n >= work.n_begin; --n) step(n, true_type{});

    if (lane_ == 0) smem_.q_empty[warpgroup_].arrive();
    smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
    if (int begin = mask.first_valid - work.n_begin * Traits::kBlockN; begin > 0) {
      zero_rows<Traits>(v_stage(), 0, begin);
    }
    gemm_async<GMMA::ScaleOut::One>(mma_pv, probs, rV(_, _, _, ring_v_.stage), output);
    float normalise[2], lse[2];
    softmax.finish(softmax_scale, normalise, lse);
    gemm_wait<0>(output);
    release_v();
#pragma unroll
    for (int i = 0; i < 2; ++i) normalise[i] *= descales.v();
#pragma unroll
    for (int i = 0; i < size(output); ++i) output(i) *= normalise[i / 2 % 2];
    Epilogue<Traits>(params_, smem_, work, rows).store(output, lse);
  }

  // Keeps rings and turns moving over the tiles [end, begin) from above, and computes nothing.
  __device__ void pass_by(const Work& work, int begin, int end) {
    for (int n = begin - 1; n >= end; --n) {
      if (n < work.n_end - 1) take_turn();  // an item's first tile is computed out of turn
      smem_.k_full[ring_k_.stage].wait(ring_k_.phase);
      release_k();
      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);
      release_v();
    }
  }

  __device__ void take_turn() const {
    turn_.wait();
    turn_.pass();
  }

  // Tells the producers of all blocks of the cluster, each of which writes to every block.
  __device__ void release(EmptyBarrier& barrier) const {
    if (lane_ < Traits::kCluster) Cluster<Traits::kCluster>::arrive(barrier, lane_);
  }
  __device__ void release_k() {
    release(smem_.k_empty[ring_k_.stage]);
    ring_k_.advance();
  }
  __device__ void release_v() {
    release(smem_.v_empty[ring_v_.stage]);
    ring_v_.advance();
  }
  __device__ Value* values() const { return reinterpret_cast<Value*>(smem_.v); }
  __device__ Value* v_stage() const { return values() + ring_v_.stage * Traits::kBlockN * Traits::kHeadDim; }

  const FwdParams& params_;
  typename Traits::SharedStorage& smem_;
  const int warpgroup_, lane_;
  Turn<Traits> turn_;
  Ring<Traits::kStages> ring_k_, ring_v_;
  uint32_t q_phase_ = 0;
};

}  // namespace lite_attention::sm90

// The consumer warpgroups: QK, mask, softmax, PV. Each owns 64 rows of the tile of queries.
//
// Two overlaps hide the softmax (FlashAttention-3, arXiv 2407.08608): inside a warpgroup QK of the next KV tile is
// issued before PV of this one, and the softmax of the next runs under it; between warpgroups, turns at the tensor
// cores let one compute exponentials while another multiplies.
#pragma once

#include "sm90/epilogue.cuh"
#include "sm90/mask.cuh"
#include "sm90/mma.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/scheduler.cuh"
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
__device__ void zero_rows(typename Traits::Element* v_stage, int begin, int end) {
  constexpr int kVectors = Traits::kRowBytes / 16;
  auto* vectors = reinterpret_cast<uint4*>(v_stage);
  for (int i = threadIdx.x % 128; i < Traits::kBlockN * Traits::kSlabs * kVectors; i += 128) {
    int row = i / kVectors % Traits::kBlockN;
    if (row >= begin && row < end) vectors[i] = make_uint4(0, 0, 0, 0);
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, kWarpgroup + threadIdx.x / 128 - 1);
}

template <class Traits>
__device__ void consume(const FwdParams& params, typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  const int warpgroup = cutlass::canonical_warp_group_idx() - 1;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = warpgroup * 64 + thread / 32 * 16 + lane / 4;

  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  auto thread_qk = mma_qk.get_slice(warpgroup * 128);
  auto thread_pv = mma_pv.get_slice(warpgroup * 128);
  Tensor sQ = make_tensor(make_smem_ptr(smem.q), typename Traits::SmemLayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(smem.k), typename Traits::SmemLayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(smem.v), typename Traits::SmemLayoutVt{});
  Tensor rQ = thread_qk.partition_fragment_A(sQ);
  Tensor rK = thread_qk.partition_fragment_B(sK);
  Tensor rV = thread_pv.partition_fragment_B(sVt);
  Tensor scores = partition_fragment_C(mma_qk, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kBlockN>>{});
  Tensor output = partition_fragment_C(mma_pv, cute::Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});

  auto release = [&](typename Traits::EmptyBarrier& barrier) {
    if (lane == 0) barrier.arrive();
  };

  Ring<Traits::kStages> ring_k, ring_v;
  uint32_t q_phase = 0;
  Turn<Traits> turn(warpgroup);
  WorkRing<Traits> ring_work(smem);
  while (true) {
    const Work work = ring_work.get();
    if (work.parts == 0) break;
    Sequence seq(params.lengths, work.batch);
    Epilogue<Traits> epilogue(params, smem, work, seq, row);
    if (work.n_begin >= work.n_end) {
      epilogue.store_nothing_seen();
      continue;
    }
    Mask mask(params.lengths, seq, params.packing, Traits::kBlockN, work.m_tile, row);
    OnlineSoftmax softmax(params.softmax_scale);
    float rescale[2];
    auto v_stage = [&] { return smem.v + ring_v.stage * Traits::kBlockN * Traits::kHeadDim; };

    smem.q_full.wait(q_phase);
    q_phase ^= 1;
    int n = work.n_end - 1;
    smem.k_full[ring_k.stage].wait(ring_k.phase);
    gemm_async<GMMA::ScaleOut::Zero>(mma_qk, rQ, rK(_, _, _, ring_k.stage), scores);
    gemm_wait<0>(scores);
    release(smem.k_empty[ring_k.stage]);
    ring_k.advance();
    if (mask.needed(n)) mask.template apply<Traits::kBlockN>(scores, n, lane);
    softmax.step(scores, rescale);
    Tensor probs = make_operand<Element>(scores);
    to_operand(scores, probs);
    clear(output);
    if (int end = mask.seqlen_k - n * Traits::kBlockN; end < Traits::kBlockN) {
      smem.v_full[ring_v.stage].wait(ring_v.phase);
      zero_rows<Traits>(v_stage(), end, Traits::kBlockN);
    }

    // One KV tile, whose K has arrived. Waiting for the next K stands between the softmax and the wait for PV for a
    // reason: with no branch there, ptxas hoists that wait above the exponentials, and nothing overlaps.
    auto step = [&](int n, auto masked) __attribute__((always_inline)) {
      turn.wait();
      gemm_async<GMMA::ScaleOut::Zero>(mma_qk, rQ, rK(_, _, _, ring_k.stage), scores);
      smem.v_full[ring_v.stage].wait(ring_v.phase);
      gemm_async<GMMA::ScaleOut::One>(mma_pv, probs, rV(_, _, _, ring_v.stage), output);
      turn.pass();
      gemm_wait<1>(scores);
      release(smem.k_empty[ring_k.stage]);
      ring_k.advance();
      if constexpr (decltype(masked)::value) mask.template apply<Traits::kBlockN>(scores, n, lane);
      const bool moved = softmax.step(scores, rescale);
      warpgroup_fence_operand(scores);
      if (n > work.n_begin) smem.k_full[ring_k.stage].wait(ring_k.phase);
      gemm_wait<0>(output);
      release(smem.v_empty[ring_v.stage]);
      ring_v.advance();
      if (moved) {
#pragma unroll
        for (int i = 0; i < size(output); ++i) output(i) *= rescale[i / 2 % 2];
      }
      to_operand(scores, probs);
    };
    if (n > work.n_begin) smem.k_full[ring_k.stage].wait(ring_k.phase);
    // From the last tile to the first: the diagonal and the keys' end, the tiles that all rows see, the left edge of a
    // window.
    for (--n; n >= max(work.n_begin, mask.clean_end); --n) step(n, true_type{});
    for (; n >= max(work.n_begin, mask.clean_begin); --n) step(n, false_type{});
    for (; n >= work.n_begin; --n) step(n, true_type{});

    release(smem.q_empty);
    smem.v_full[ring_v.stage].wait(ring_v.phase);
    if (int begin = mask.first_valid - work.n_begin * Traits::kBlockN; begin > 0)
      zero_rows<Traits>(v_stage(), 0, begin);
    gemm_async<GMMA::ScaleOut::One>(mma_pv, probs, rV(_, _, _, ring_v.stage), output);
    float normalise[2], lse[2];
    softmax.finish(params.softmax_scale, normalise, lse);
    gemm_wait<0>(output);
    release(smem.v_empty[ring_v.stage]);
    ring_v.advance();
#pragma unroll
    for (int i = 0; i < size(output); ++i) output(i) *= normalise[i / 2 % 2];
    epilogue.store(output, lse);
  }
}

}  // namespace lite_attention::sm90

// Thin helpers around wgmma through CuTe.
#pragma once

#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

// Issues C (+)= A B over all k blocks as one committed group; the caller waits. A and B are fragments of one stage:
// (MMA, M or N, K). `first` says whether C is added to.
template <class Mma, class A, class B, class C>
__device__ void gemm_async(Mma& mma, const A& a, const B& b, C& c, GMMA::ScaleOut first) {
  warpgroup_fence_operand(c);
  if constexpr (!is_base_of<GMMA::DescriptorIterator, typename Mma::FrgTypeA>::value)
    warpgroup_fence_operand(const_cast<A&>(a));
  warpgroup_arrive();
  mma.accumulate_ = first;
#pragma unroll
  for (int k = 0; k < size<2>(a); ++k) {
    cute::gemm(mma, a(_, _, k), b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  warpgroup_commit_batch();
}

// Waits until at most kPending groups are in flight; c is ready after it.
template <int kPending, class C>
__device__ void gemm_wait(C& c) {
  warpgroup_wait<kPending>();
  warpgroup_fence_operand(c);
}

// The accumulator of one product as the A operand of the next. For 16-bit types a thread holds both in the same order:
// pairs of columns, then the two rows, then column groups of 8; two groups make one k block of 16.
template <class Element, class Scores>
__device__ auto make_operand(const Scores&) {
  return make_tensor<Element>(
      Layout<cute::Shape<cute::Shape<_2, _2, _2>, _1, Int<decltype(size(Scores{}))::value / 8>>>{});
}

template <class Scores, class Operand>
__device__ void to_operand(const Scores& scores, Operand& operand) {
  using Element = typename Operand::value_type;
  cutlass::NumericArrayConverter<Element, float, 2> convert;
  Tensor words =
      recast<uint32_t>(operand);  // element by element the compiler would take pairs apart and join them again
#pragma unroll
  for (int i = 0; i < size(words); ++i) {
    auto pair = convert(cutlass::Array<float, 2>{scores(2 * i), scores(2 * i + 1)});
    words(i) = reinterpret_cast<const uint32_t&>(pair);
  }
}

}  // namespace lite_attention::sm90

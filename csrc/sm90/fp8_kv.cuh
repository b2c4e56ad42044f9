// Kernels over keys and values in FP8 E4M3. TMA brings their bytes into rings of their own, a converter warpgroup
// (converter.cuh) fills the 16-bit stages from there, and the consumers are those of 16-bit keys: queries keep their 16
// bits, and keys and values are not rounded again.
#pragma once

#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

// Rows, keys, ring stages, and stages of loaded bytes. Two 16-bit stages will do, as memory's latency is behind the
// loaded ones. No clusters: a block converts all that it reads. The two shapes of a head dim have one kBlockN, so that
// a row's result does not depend on which of them computes it.
template <int kBlockM, int kBlockN, int kLoadStages_>
struct Fp8Shape : Shape<kBlockM, kBlockN, 2> {
  static constexpr int kLoadStages = kLoadStages_;
};

template <int kHeadDim, bool kDecode>
struct Fp8TileShape;
template <>
struct Fp8TileShape<64, false> : Fp8Shape<128, 192, 3> {};
template <>
struct Fp8TileShape<64, true> : Fp8Shape<64, 192, 4> {};
template <>
struct Fp8TileShape<96, false> : Fp8Shape<128, 128, 3> {};
template <>
struct Fp8TileShape<96, true> : Fp8Shape<64, 128, 4> {};
template <>
struct Fp8TileShape<128, false> : Fp8Shape<128, 128, 2> {};
template <>
struct Fp8TileShape<128, true> : Fp8Shape<64, 128, 2> {};
template <>
struct Fp8TileShape<192, false> : Fp8Shape<128, 64, 3> {};
template <>
struct Fp8TileShape<192, true> : Fp8Shape<64, 64, 4> {};
template <>
struct Fp8TileShape<256, false> : Fp8Shape<128, 64, 1> {};
template <>
struct Fp8TileShape<256, true> : Fp8Shape<64, 64, 2> {};

// What all kernels with a converter have in common: Query is the type that Q and K are multiplied in.
template <class Element, int kHeadDim, class TileShape, bool kScoreMod, class Query = Element>
struct ConverterTraits : Traits<Element, kHeadDim, TileShape, kScoreMod, false, Query> {
  using Base = Traits<Element, kHeadDim, TileShape, kScoreMod, false, Query>;
  using typename Base::EmptyBarrier;
  using typename Base::FullBarrier;

  static constexpr int kConverterWarps = 4;
  static constexpr int kThreads = Base::kThreads + 32 * kConverterWarps;

  // Values become float16 also beside bfloat16 queries, as their conversion to that is one instruction and not four.
  // Then probabilities are float16 too, with three bits more. Small ones would vanish, a million keys of a 2^-25th of
  // the largest: they are multiplied by as much as float16 has room for above 2^OnlineSoftmax::kSlack.
  using Value = cutlass::half_t;
  static constexpr int kProbabilityShift = 12;

  // A launch gives all threads the same share of 64 Ki registers, from which these move.
  static constexpr bool kMoveRegisters = true;
  static constexpr bool kDecode = Base::kConsumerWarpgroups == 1;
  static constexpr bool kWide = kHeadDim == 256 && !kDecode;
  static constexpr int kProducerRegisters = kWide ? 32 : 40;
  static constexpr int kConverterRegisters = kDecode ? 88 : kWide ? 48 : 56;
  static constexpr int kConsumerRegisters = kDecode ? 240 : kWide ? 216 : 208;
  static constexpr int kLaunchRegisters = 64 * 1024 / kThreads / 8 * 8;
  static_assert(kProducerRegisters + kConverterRegisters + Base::kConsumerWarpgroups * kConsumerRegisters <=
                    kThreads / 128 * kLaunchRegisters,
                "warpgroups would wait for registers that there are not");
  static constexpr int kConvertAtOnce = kDecode ? 8 : 4;  // vectors that a thread holds

  // ptxas compiles all of a kernel for the registers of its launch, which an accumulator of 256 columns exceeds.
  static constexpr int kOutputColumns = kWide ? 128 : kHeadDim;
  using MmaPV = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Value, Value, float,
                           cute::Shape<Int<Base::kBlockM>, Int<kOutputColumns>, Int<Base::kBlockN>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      typename Base::WarpgroupLayout{}));

  using Loaded = uint8_t;
  static constexpr int kLoadStages = TileShape::kLoadStages;
  static constexpr int kLoadedRowBytes = Base::kSlabColumns;
  using Loads = TileRing<Loaded, FullBarrier, EmptyBarrier>;
};

template <class Element, int kHeadDim, class TileShape, bool kScoreMod>
struct Fp8Traits : ConverterTraits<Element, kHeadDim, TileShape, kScoreMod> {
  using Base = ConverterTraits<Element, kHeadDim, TileShape, kScoreMod>;
  using typename Base::EmptyBarrier;
  using typename Base::FullBarrier;
  using typename Base::Loaded;
  using typename Base::Loads;

  static constexpr bool kConvertsKeys = true;

  struct SharedStorage : Base::SharedStorage {
    static constexpr int kBytes = Base::kLoadStages * Base::kBlockN * kHeadDim;
    alignas(128) Loaded loaded_k[kBytes];
    alignas(128) Loaded loaded_v[kBytes];
    FullBarrier loaded_k_full[Base::kLoadStages];
    EmptyBarrier loaded_k_empty[Base::kLoadStages];
    FullBarrier loaded_v_full[Base::kLoadStages];
    EmptyBarrier loaded_v_empty[Base::kLoadStages];
  };
  static constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;
  static_assert(kSmemBytes <= 227 * 1024, "a block has 227 KB on sm_90");

  __device__ static Loads k_loads(SharedStorage& smem) {
    return {smem.loaded_k_full, smem.loaded_k_empty, smem.loaded_k};
  }
  __device__ static Loads v_loads(SharedStorage& smem) {
    return {smem.loaded_v_full, smem.loaded_v_empty, smem.loaded_v};
  }
};

template <class Element, int kHeadDim>
Kernel select_fp8_kv_kernel(TileKind kind, bool score_mod) {
  auto select = [&](auto decode, auto modified) {
    using T = Fp8Traits<Element, kHeadDim, Fp8TileShape<kHeadDim, decltype(decode)::value>, decltype(modified)::value>;
    return Kernel{{kHeadDim, T::kBlockM, T::kBlockN, T::kCluster, T::kSlabColumns, T::kBoxRows}, launch<T>};
  };
  if (kind == TileKind::kDecode) {
    return score_mod ? select(true_type{}, true_type{}) : select(true_type{}, false_type{});
  }
  return score_mod ? select(false_type{}, true_type{}) : select(false_type{}, false_type{});
}

}  // namespace lite_attention::sm90

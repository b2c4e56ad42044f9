// Kernels over queries, keys and values in FP8 E4M3. QK multiplies Q and K as they are, at twice the rate of 16 bits; V
// becomes 16 bits as beside 16-bit queries (fp8_kv.cuh), so that probabilities and their product with V keep that
// precision.
#pragma once

#include "sm90/fp8_kv.cuh"

namespace lite_attention::sm90 {

// One shape a head dim serves prefill and decode: a row's result depends on neither, and what bounds a decode step is
// the bytes under way, of which there are enough. K has as many stages as there are of V's bytes.
template <int kBlockM, int kBlockN, int kLoadStages>
struct Fp8QkvShape : Fp8Shape<kBlockM, kBlockN, kLoadStages> {
  static constexpr int kKeyStages = kLoadStages;
};

template <int kHeadDim>
struct Fp8QkvTileShape;
template <>
struct Fp8QkvTileShape<64> : Fp8QkvShape<128, 192, 4> {};
template <>
struct Fp8QkvTileShape<96> : Fp8QkvShape<128, 128, 4> {};
template <>
struct Fp8QkvTileShape<128> : Fp8QkvShape<128, 128, 3> {};
template <>
struct Fp8QkvTileShape<192> : Fp8QkvShape<128, 96, 3> {};
template <>
struct Fp8QkvTileShape<256> : Fp8QkvShape<128, 64, 4> {};

template <int kHeadDim, bool kScoreMod>
struct Fp8QkvTraits
    : ConverterTraits<cutlass::bfloat16_t, kHeadDim, Fp8QkvTileShape<kHeadDim>, kScoreMod, cutlass::float_e4m3_t> {
  using Base =
      ConverterTraits<cutlass::bfloat16_t, kHeadDim, Fp8QkvTileShape<kHeadDim>, kScoreMod, cutlass::float_e4m3_t>;
  using typename Base::EmptyBarrier;
  using typename Base::FullBarrier;

  // Float16 alone is quickly made, in few registers.
  static constexpr int kProducerRegisters = 40, kConverterRegisters = 40, kConsumerRegisters = 216;
  static_assert(kProducerRegisters + kConverterRegisters + 2 * kConsumerRegisters <=
                    Base::kThreads / 128 * Base::kLaunchRegisters,
                "warpgroups would wait for registers that there are not");

  using Loaded = typename Base::Query;
  using Loads = TileRing<Loaded, FullBarrier, EmptyBarrier>;

  struct SharedStorage : Base::SharedStorage {
    alignas(128) Loaded loaded_v[Base::kLoadStages * Base::kBlockN * kHeadDim];
    FullBarrier loaded_v_full[Base::kLoadStages];
    EmptyBarrier loaded_v_empty[Base::kLoadStages];
  };
  static constexpr int kSmemBytes = sizeof(SharedStorage) + 1024;
  static_assert(kSmemBytes <= 227 * 1024, "a block has 227 KB on sm_90");

  __device__ static Loads k_loads(SharedStorage& smem) { return {smem.k_full, smem.k_empty, smem.k}; }
  __device__ static Loads v_loads(SharedStorage& smem) {
    return {smem.loaded_v_full, smem.loaded_v_empty, smem.loaded_v};
  }
};

template <int kHeadDim>
Kernel select_fp8_qkv_kernel(bool score_mod) {
  auto select = [&](auto modified) {
    using T = Fp8QkvTraits<kHeadDim, decltype(modified)::value>;
    return Kernel{{kHeadDim, T::kBlockM, T::kBlockN, T::kCluster, T::kSlabColumns, T::kBoxRows}, launch<T>};
  };
  return score_mod ? select(true_type{}) : select(false_type{});
}

}  // namespace lite_attention::sm90

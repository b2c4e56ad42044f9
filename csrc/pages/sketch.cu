// Writes the sketches of full pages from their keys.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>

#include "dependent_launch.cuh"
#include "pages/format.cuh"
#include "pages/launch.h"
#include "pages/layout.cuh"
#include "pages/warp.cuh"

namespace lite_attention::pages {
namespace {

constexpr int kWarps = 2;
constexpr int kChannels = 4;                   // neighbouring ones that a lane has
constexpr int kLaneChannels = 32 * kChannels;  // of all lanes, in one round
constexpr int kEntries = kPage;                // a warp looks at: one page fills among so many tokens
constexpr float kUnknown = __builtin_nanf("");

template <class Key>
struct Quad;
template <>
struct Quad<__nv_bfloat16> {
  using Word = uint2;
  __device__ static void widen(Word word, float (&x)[kChannels]) {
    x[0] = __uint_as_float(word.x << 16), x[1] = __uint_as_float(word.x & 0xffff0000u);
    x[2] = __uint_as_float(word.y << 16), x[3] = __uint_as_float(word.y & 0xffff0000u);
  }
};
template <>
struct Quad<__half> {
  using Word = uint2;
  __device__ static void widen(Word word, float (&x)[kChannels]) {
    const float2 low = __half22float2(reinterpret_cast<const __half2&>(word.x));
    const float2 high = __half22float2(reinterpret_cast<const __half2&>(word.y));
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
};
template <>
struct Quad<__nv_fp8_e4m3> {
  using Word = uint32_t;
  __device__ static void widen(Word word, float (&x)[kChannels]) {
    const float4 wide = static_cast<float4>(reinterpret_cast<const __nv_fp8x4_e4m3&>(word));
    x[0] = wide.x, x[1] = wide.y, x[2] = wide.z, x[3] = wide.w;
  }
};

// Offset and step over the channels of all lanes; `known` turns false where these are not numbers.
template <int kRounds>
__device__ float2 scales(const float (&x)[kRounds][kChannels], int head_dim, int levels, bool& known) {
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      if (round * kLaneChannels + int(threadIdx.x % 32) * kChannels >= head_dim) continue;
      known = known && isfinite(x[round][i]);
      low = fminf(low, x[round][i]);
      high = fmaxf(high, x[round][i]);
    }
  }
  low = warp_min(low);
  const float step = __fdiv_rn(warp_max(high) - low, float(levels));
  known = __all_sync(~0u, known && isfinite(step));
  return {low, step};
}

// `inverse` is of the step. Where all channels are alike both are 0, and so are the codes.
__device__ uint32_t code(float x, float2 scale, float inverse, int levels) {
  return uint32_t(fminf(fmaxf(rintf((x - scale.x) * inverse), 0.f), float(levels)));
}
__device__ float inverse_of(float2 scale) { return scale.y > 0.f ? __fdiv_rn(1.f, scale.y) : 0.f; }

// A warp writes the sketch of one page and head.
template <class Key, int kBits, int kRounds>
__device__ void write(const SketchParams& params, int page, int head) {
  using Word = typename Quad<Key>::Word;
  constexpr int kMeanLevels = Format<kBits>::kMeanLevels;
  const int lane = threadIdx.x % 32, head_dim = params.sketches.head_dim;
  const Key* keys = static_cast<const Key*>(params.keys) + page * params.strides.batch + head * params.strides.head;
  float mean[kRounds][kChannels], deviation[kRounds][kChannels];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int channel = round * kLaneChannels + lane * kChannels;
    Word words[kPage];
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      words[token] =
          channel < head_dim ? *reinterpret_cast<const Word*>(keys + token * params.strides.token + channel) : Word{};
    }
    float x[kChannels], sum[kChannels] = {}, squares[kChannels] = {};
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      Quad<Key>::widen(words[token], x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[i] += x[i];
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) mean[round][i] = sum[i] * (1.f / kPage);
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      Quad<Key>::widen(words[token], x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const float apart = x[i] - mean[round][i];
        squares[i] += apart * apart;
      }
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) deviation[round][i] = __fsqrt_rn(squares[i] * (1.f / kPage));
  }

  bool known = true;
  const float2 mean_scale = scales(mean, head_dim, kMeanLevels, known);
  const float2 deviation_scale = scales(deviation, head_dim, kDeviationLevels, known);
  const float mean_inverse = inverse_of(mean_scale), deviation_inverse = inverse_of(deviation_scale);
  uint8_t* sketch = params.sketches.data + page * params.sketches.page_stride + head * params.sketches.head_stride;
  if (lane == 0) {
    *reinterpret_cast<float4*>(sketch) =
        known ? make_float4(mean_scale.x, mean_scale.y, deviation_scale.x, deviation_scale.y)
              : make_float4(kUnknown, kUnknown, kUnknown, kUnknown);
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int channel = round * kLaneChannels + lane * kChannels;
    uint32_t means = 0, deviations = 0;
    if (known && channel < head_dim) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        means |= code(mean[round][i], mean_scale, mean_inverse, kMeanLevels) << 8 * i;
        deviations |= code(deviation[round][i], deviation_scale, deviation_inverse, kDeviationLevels)
                      << (kBits == 8 ? 8 : 4) * i;
      }
    }
    if constexpr (kBits == 8) means |= deviations << 4;
    if (channel < aligned(head_dim)) *reinterpret_cast<uint32_t*>(sketch + kHeader + channel) = means;
    if (kBits == 12 && channel / 2 < aligned(head_dim / 2)) {
      *reinterpret_cast<uint16_t*>(sketch + deviations_at(head_dim) + channel / 2) = uint16_t(deviations);
    }
  }
}

template <class Key, int kBits, int kRounds>
__global__ __launch_bounds__(32 * kWarps, 12) void sketch_kernel(const __grid_constant__ SketchParams params) {
  wait_for_kernels_before();
  let_next_kernel_wait();
  // Blocks beside each other have the heads of the same pages, whose keys are neighbours.
  const unsigned heads = params.sketches.heads_k, block = blockIdx.x / heads;
  const int lane = threadIdx.x % 32, first = (block * kWarps + threadIdx.x / 32) * kEntries;
  const int entry = first + lane;
  const int page = lane < kEntries && entry < params.count ? params.pages[entry] : -1;
  uint32_t full = __ballot_sync(~0u, page >= 0 && page < params.sketches.num_blocks);
  while (full) {
    write<Key, kBits, kRounds>(params, __shfl_sync(~0u, page, __ffs(full) - 1), blockIdx.x - block * heads);
    full &= full - 1;
  }
}

template <class Key, int kBits>
cudaError_t launch(const SketchParams& params, cudaStream_t stream) {
  const unsigned blocks = (params.count + kWarps * kEntries - 1) / (kWarps * kEntries) * params.sketches.heads_k;
  if (params.sketches.head_dim <= kLaneChannels) {
    return launch_dependent(sketch_kernel<Key, kBits, 1>, blocks, 32 * kWarps, 0, stream, 1, params);
  }
  return launch_dependent(sketch_kernel<Key, kBits, 2>, blocks, 32 * kWarps, 0, stream, 1, params);
}

template <class Key>
cudaError_t launch_bits(const SketchParams& params, cudaStream_t stream) {
  return params.sketches.bits == 8 ? launch<Key, 8>(params, stream) : launch<Key, 12>(params, stream);
}

}  // namespace

cudaError_t launch_sketch(const SketchParams& params, cudaStream_t stream) {
  switch (params.type) {
    case KeyType::kBFloat16:
      return launch_bits<__nv_bfloat16>(params, stream);
    case KeyType::kHalf:
      return launch_bits<__half>(params, stream);
    default:
      return launch_bits<__nv_fp8_e4m3>(params, stream);
  }
}

}  // namespace lite_attention::pages

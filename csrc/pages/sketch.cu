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

// Of the squares of distances that this lane has of each token, those of all lanes: of token lane_token().
__device__ float gather_squares(float (&squares)[kPage]) {
#pragma unroll
  for (int half = kPage / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & 2 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? squares[i] : squares[i + half], kept = upper ? squares[i + half] : squares[i];
      squares[i] = kept + __shfl_xor_sync(~0u, given, 2 * half);
    }
  }
  return squares[0] + __shfl_xor_sync(~0u, squares[0], 1);
}

// What is not negative.
__device__ float warp_max_of_positive(float x) { return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x))); }

// Of which a lane has the sum after gather_squares.
__device__ int lane_token() { return threadIdx.x % 32 / 2; }

struct Farthest {
  int token;
  float deviation;  // of the other keys around their mean, in all channels

  // From the squares of the tokens' distances to their mean, in all channels.
  __device__ Farthest(float (&squares)[kPage], int head_dim) {
    const float square = gather_squares(squares), most = warp_max_of_positive(square);
    token = (__ffs(__ballot_sync(~0u, square == most)) - 1) / 2;
    // Two lanes have each token's: one of them counts. Around a mean without the farthest key the others' are less.
    const bool counts = threadIdx.x % 2 == 0 && lane_token() != token;
    const float of_others = warp_sum(counts ? square : 0.f) - most * (1.f / kOthers);
    deviation = __fsqrt_rn(fmaxf(0.f, of_others) * (1.f / kOthers) / float(head_dim));
    if (!isfinite(most)) deviation = kUnknown;
  }
};

__device__ uint32_t code(float x, float inverse_step, int least, int levels) {
  return uint32_t(int(fminf(fmaxf(rintf(x * inverse_step), float(least)), float(levels))) - least);
}
// Where all channels are alike a step is 0, and so are the codes.
__device__ float inverse_of(float step) { return step > 0.f ? __fdiv_rn(1.f, step) : 0.f; }

// The sums of a page's keys in this lane's channels, and of each token the square of its distance to the mean there.
template <class Key, int kRounds>
__device__ void sum_keys(const Key* keys, int64_t token_stride, int head_dim, float (&sum)[kRounds][kChannels],
                         float (&squares)[kPage]) {
  using Word = typename Quad<Key>::Word;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int channel = round * kLaneChannels + int(threadIdx.x % 32) * kChannels;
    Word words[kPage];
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      words[token] =
          channel < head_dim ? *reinterpret_cast<const Word*>(keys + token * token_stride + channel) : Word{};
    }
    float x[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[round][i] = 0.f;
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      Quad<Key>::widen(words[token], x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sum[round][i] += x[i];
    }
#pragma unroll
    for (int token = 0; token < kPage; ++token) {
      Quad<Key>::widen(words[token], x);
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        const float apart = x[i] - sum[round][i] * (1.f / kPage);
        squares[token] += apart * apart;
      }
    }
  }
}

// A warp writes the sketch of one page and head.
template <class Key, int kBits, int kRounds>
__device__ void write(const SketchParams& params, int page, int head) {
  using Word = typename Quad<Key>::Word;
  constexpr int kMeanLevels = Format<kBits>::kMeanLevels;
  const int lane = threadIdx.x % 32, head_dim = params.sketches.head_dim;
  const Key* keys = static_cast<const Key*>(params.keys) + page * params.strides.batch + head * params.strides.head;
  float sum[kRounds][kChannels], squares[kPage] = {};
  sum_keys(keys, params.strides.token, head_dim, sum, squares);
  const Farthest farthest(squares, head_dim);

  float key[kRounds][kChannels], mean[kRounds][kChannels], low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int channel = round * kLaneChannels + lane * kChannels;
    const bool there = channel < head_dim;
    const Key* from = keys + farthest.token * params.strides.token + channel;
    Quad<Key>::widen(there ? *reinterpret_cast<const Word*>(from) : Word{}, key[round]);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      mean[round][i] = (sum[round][i] - key[round][i]) * (1.f / kOthers);
      low = there ? fminf(low, mean[round][i]) : low;
      high = there ? fmaxf(high, mean[round][i]) : high;
    }
  }
  low = warp_min(low);
  const float step = __fdiv_rn(warp_max(high) - low, float(kMeanLevels)), inverse = inverse_of(step);
  uint32_t means[kRounds];
  float largest = 0.f;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    means[round] = 0;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const uint32_t mean_code = code(mean[round][i] - low, inverse, 0, kMeanLevels);
      means[round] |= mean_code << 8 * i;
      key[round][i] -= fmaf(float(mean_code), step, low);
      if (round * kLaneChannels + lane * kChannels < head_dim) largest = fmaxf(largest, fabsf(key[round][i]));
    }
  }
  const float difference_step = __fdiv_rn(warp_max_of_positive(largest), float(kDifferenceLevels));
  const float difference_inverse = inverse_of(difference_step);
  const bool known = isfinite(step) && isfinite(low) && isfinite(difference_step) && isfinite(farthest.deviation);
  uint8_t* sketch = params.sketches.data + page * params.sketches.page_stride + head * params.sketches.head_stride;
  if (lane == 0) {
    *reinterpret_cast<float4*>(sketch) = known ? make_float4(low, step, difference_step, farthest.deviation)
                                               : make_float4(kUnknown, kUnknown, kUnknown, kUnknown);
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int channel = round * kLaneChannels + lane * kChannels;
    const bool there = known && channel < head_dim;
    uint32_t differences[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      differences[i] = code(key[round][i], difference_inverse, -kDifferenceLevels, kDifferenceLevels) +
                       (kNoDifference - kDifferenceLevels);
    }
    if constexpr (kBits == 8) {
      means[round] |= differences[0] << 4 | differences[1] << 12 | differences[2] << 20 | differences[3] << 28;
    } else {
      // Of eight channels the even ones, then the odd ones: two lanes have them.
      const uint32_t own = (differences[0] | differences[2] << 4 | differences[1] << 16 | differences[3] << 20)
                           << 8 * (lane % 2);
      const uint32_t word = own | __shfl_xor_sync(~0u, own, 1);
      if (lane % 2 == 0 && channel / 2 < aligned(head_dim / 2)) {
        *reinterpret_cast<uint32_t*>(sketch + differences_at(head_dim) + channel / 2) = there ? word : 0;
      }
    }
    if (channel < aligned(head_dim)) {
      *reinterpret_cast<uint32_t*>(sketch + kHeader + channel) = there ? means[round] : 0;
    }
  }
}

template <class Key, int kBits, int kRounds>
__global__ __launch_bounds__(32 * kWarps,
                             kRounds == 1 ? 16 : 12) void sketch_kernel(const __grid_constant__ SketchParams params) {
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

// The bytes of a sketch, as lite_attention/pages/layout.py specifies them.
#pragma once

#include <cstdint>

namespace lite_attention::pages {

constexpr int kPage = 16;       // tokens
constexpr int kAlignment = 16;  // bytes, of a vector load
constexpr int kHeader = 16;     // bytes: offset and step of the means, offset and step of the deviations
constexpr int kMeanLevels = 255, kDeviationLevels = 15;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueries = 64;  // of a sequence and KV head: query tokens times heads of the group

__host__ __device__ constexpr int aligned(int size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }
__host__ __device__ constexpr int deviations_at(int head_dim) { return kHeader + aligned(head_dim); }
__host__ __device__ constexpr int sketch_bytes(int head_dim) {
  return deviations_at(head_dim) + aligned((head_dim + 1) / 2);
}

}  // namespace lite_attention::pages

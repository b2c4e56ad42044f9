// The bytes of a sketch, as lite_attention/pages/layout.py specifies them.
#pragma once

#include <cstdint>

namespace lite_attention::pages {

constexpr int kPage = 16;             // tokens
constexpr int kAlignment = 16;        // bytes, of a vector load
constexpr int kOthers = kPage - 1;    // keys of a page that aren't kept apart
constexpr int kHeader = 16;           // bytes: offset and step of the mean, step of the difference, deviation
constexpr int kDifferenceLevels = 7;  // of either sign
constexpr int kNoDifference = 8;      // its code
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueries = 64;  // of a sequence and KV head: query tokens times heads of the group

__host__ __device__ constexpr int aligned(int size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }
__host__ __device__ constexpr int differences_at(int head_dim) { return kHeader + aligned(head_dim); }

}  // namespace lite_attention::pages

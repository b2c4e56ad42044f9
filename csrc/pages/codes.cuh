// The codes of sketches, from memory to the rows of matrix products.
//
// They become small integers in fp16, which are exact: a byte what it is, a nibble 16 more than it is, as it is put
// into the mantissa of 16.
#pragma once

#include <cuda_fp16.h>

#include "pages/launch.h"
#include "pages/layout.cuh"

namespace lite_attention::pages {

constexpr int kBias = 16;  // of nibbles

__device__ inline __half2 as_half2(uint32_t x) { return reinterpret_cast<const __half2&>(x); }
__device__ inline uint32_t as_word(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }

// Two bytes of the word. 0x6400 | n is 1024 + n in fp16.
__device__ inline uint32_t bytes(uint32_t word, int selector) {
  return as_word(__hsub2(as_half2(__byte_perm(word, 0x64646464u, selector)), as_half2(0x64006400u)));
}
// Bits 6 to 9 of both halves of the word. 0x4c00 | n << 6 is 16 + n in fp16. In one instruction: by itself the compiler
// takes two, as only one can have both constants.
__device__ inline uint32_t nibbles(uint32_t word) {
  uint32_t biased;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(biased) : "r"(word), "r"(0x03c003c0u), "r"(0x4c004c00u));
  return biased;
}

// What a thread has of a product's 16 rows, which are pages, and 16 channels: two pages 8 apart, and four channels.
using Rows = uint32_t[4];

// The codes of a thread's two pages: the means of 16 channels and the differences of the same, of every 64.
template <int kBits, int kRounds>
struct Codes;

template <int kRounds>
struct Codes<12, kRounds> {
  static constexpr int kMeanBias = 0;

  float4 scales[2];
  uint4 means[2][kRounds];
  uint2 differences[2][kRounds];

  __device__ void load(const Sketches& sketches, const int (&pages)[2], int head) {
    const int head_dim = sketches.head_dim;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* sketch = sketches.data + pages[i] * sketches.page_stride + head * sketches.head_stride;
      // By ordinary loads, which stay behind the wait for the kernel that may just write sketches.
      scales[i] = *reinterpret_cast<const float4*>(sketch);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int channel = 64 * round + 16 * (threadIdx.x % 4);
        const bool there = channel < head_dim;
        const uint8_t *mean = sketch + kHeader + channel, *difference = sketch + differences_at(head_dim) + channel / 2;
        means[i][round] = there ? *reinterpret_cast<const uint4*>(mean) : make_uint4(0, 0, 0, 0);
        differences[i][round] = there ? *reinterpret_cast<const uint2*>(difference) : make_uint2(0, 0);
      }
    }
  }

  // Channels 4 * part to 4 * part + 3 of the 16.
  __device__ void mean_rows(int round, int part, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4& all = means[i][round];
      const uint32_t word = part == 0 ? all.x : part == 1 ? all.y : part == 2 ? all.z : all.w;
      rows[i] = bytes(word, 0x4140);
      rows[2 + i] = bytes(word, 0x4342);
    }
  }

  // Of the eight channels of a word the pairs in bits 0 and 16, and 4 and 20, or in 8 and 24, and 12 and 28.
  __device__ void difference_rows(int round, int part, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = part < 2 ? differences[i][round].x : differences[i][round].y;
      rows[i] = nibbles(part % 2 == 0 ? word << 6 : word >> 2);
      rows[2 + i] = nibbles(part % 2 == 0 ? word << 2 : word >> 6);
    }
  }
};

template <int kRounds>
struct Codes<8, kRounds> {
  static constexpr int kMeanBias = kBias;

  float4 scales[2];
  uint4 both[2][kRounds];

  __device__ void load(const Sketches& sketches, const int (&pages)[2], int head) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* sketch = sketches.data + pages[i] * sketches.page_stride + head * sketches.head_stride;
      // By ordinary loads, as those of 12 bits.
      scales[i] = *reinterpret_cast<const float4*>(sketch);
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        const int channel = 64 * round + 16 * (threadIdx.x % 4);
        both[i][round] = channel < sketches.head_dim ? *reinterpret_cast<const uint4*>(sketch + kHeader + channel)
                                                     : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // Of the four channels of a word the nibbles in bits 0 and 16, and 8 and 24.
  __device__ void mean_rows(int round, int part, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = channels(i, round, part);
      rows[i] = nibbles(word << 6);
      rows[2 + i] = nibbles(word >> 2);
    }
  }
  // Those in bits 4 and 20, and 12 and 28.
  __device__ void difference_rows(int round, int part, Rows& rows) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = channels(i, round, part);
      rows[i] = nibbles(word << 2);
      rows[2 + i] = nibbles(word >> 6);
    }
  }

 private:
  __device__ uint32_t channels(int i, int round, int part) const {
    const uint4& all = both[i][round];
    return part == 0 ? all.x : part == 1 ? all.y : part == 2 ? all.z : all.w;
  }
};

}  // namespace lite_attention::pages

// The formats of a sketch, by the bits of a channel: 12 are 8 of the mean and 4 of the key apart, 8 are 4 of each.
// Their bytes are as lite_attention/pages/layout.py specifies them.
#pragma once

#include "pages/layout.cuh"

namespace lite_attention::pages {

template <int kBits>
struct Format;

// A code of the mean is a byte; codes of differences lie behind those of all means. The order of those in a word is the
// one in which its halves give the channels 0 1, 2 3, 4 5, 6 7.
template <>
struct Format<12> {
  static constexpr int kMeanLevels = 255;
  __host__ __device__ static constexpr int bytes(int head_dim) {
    return differences_at(head_dim) + aligned((head_dim + 1) / 2);
  }
  // Where the query of a channel is among the columns of products: in the order in which a thread takes the codes from
  // its loads.
  __device__ static constexpr int place(int channel) { return channel; }
};

// A byte is a channel: the code of its mean in the low half, of its difference in the high one. A word gives the
// channels 0 2, 1 3 of both.
template <>
struct Format<8> {
  static constexpr int kMeanLevels = 15;
  __host__ __device__ static constexpr int bytes(int head_dim) { return kHeader + aligned(head_dim); }
  __device__ static constexpr int place(int channel) { return (channel & ~3) + 2 * (channel % 2) + channel / 2 % 2; }
};

// Of sketches of that many bytes; 0 where no format has so many. No two formats have the same for any head_dim.
constexpr int bits_of(int head_dim, int64_t size) {
  return size == Format<12>::bytes(head_dim) ? 12 : size == Format<8>::bytes(head_dim) ? 8 : 0;
}

}  // namespace lite_attention::pages

// The formats of a sketch, by the bits of a channel: 12 are 8 of its mean and 4 of its deviation, 8 are 4 of each.
// Their bytes are as lite_attention/pages/layout.py specifies them.
#pragma once

#include "pages/layout.cuh"

namespace lite_attention::pages {

template <int kBits>
struct Format;

// A code of the mean is a byte; codes of deviations lie behind those of all means.
template <>
struct Format<12> {
  static constexpr int kMeanLevels = pages::kMeanLevels;
  __host__ __device__ static constexpr int bytes(int head_dim) { return sketch_bytes(head_dim); }

  // Where the query of a channel is among the columns of products with means and with deviations: in the order in which
  // a thread takes the codes from its loads. A word of deviations gives the channels 0 4, 1 5, 2 6, 3 7.
  __device__ static constexpr int mean_place(int channel) { return channel; }
  __device__ static constexpr int deviation_place(int channel) {
    return (channel & ~7) + 2 * (channel % 4) + channel / 4 % 2;
  }
};

// A byte is a channel: the code of its mean in the low half, of its deviation in the high one. A word gives the
// channels 0 2, 1 3 of both.
template <>
struct Format<8> {
  static constexpr int kMeanLevels = 15;
  __host__ __device__ static constexpr int bytes(int head_dim) { return kHeader + aligned(head_dim); }
  __device__ static constexpr int mean_place(int channel) {
    return (channel & ~3) + 2 * (channel % 2) + channel / 2 % 2;
  }
  __device__ static constexpr int deviation_place(int channel) { return mean_place(channel); }
};

// Of sketches of that many bytes; 0 where no format has so many. No two formats have the same for any head_dim.
constexpr int bits_of(int head_dim, int64_t size) {
  return size == Format<12>::bytes(head_dim) ? 12 : size == Format<8>::bytes(head_dim) ? 8 : 0;
}

}  // namespace lite_attention::pages

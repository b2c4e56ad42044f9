// FP8 E4M3 to 16 bits, exactly: 16 values at a time, as 8 words of two.
#pragma once

#include <cutlass/numeric_types.h>

#include <cstdint>

namespace lite_attention::sm90 {

template <class Element>
struct FromE4M3;

template <>
struct FromE4M3<cutlass::half_t> {
  static constexpr uint16_t kNaN = 0x7fff;

  __device__ bool missed_nan() const { return false; }

  __device__ void convert(const uint32_t (&words)[4], uint32_t (&pairs)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm("{\n"
          ".reg .b16 low, high;\n"
          "mov.b32 {low, high}, %2;\n"
          "cvt.rn.f16x2.e4m3x2 %0, low;\n"
          "cvt.rn.f16x2.e4m3x2 %1, high;\n"
          "}\n"
          : "=r"(pairs[2 * i]), "=r"(pairs[2 * i + 1])
          : "r"(words[i]));
    }
  }
};

// There is no instruction for it, and by way of float it takes three conversions, of which a multiprocessor does few.
// Instead exponent and mantissa move to where bfloat16 has them, and a multiplication by 2^120 makes up for the other
// bias of the exponent, of subnormals too. Only a NaN, which is all ones, comes out as a number: these are looked for
// by the largest magnitude.
template <>
struct FromE4M3<cutlass::bfloat16_t> {
  static constexpr uint16_t kNaN = 0x7fff;

  // Whether any call so far met a NaN.
  __device__ bool missed_nan() const { return (largest_ & 0xffff) == kNaNMoved || largest_ >> 16 == kNaNMoved; }

  __device__ void convert(const uint32_t (&words)[4], uint32_t (&pairs)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Each byte as the upper half of 16 bits.
      const uint32_t spread = __byte_perm(words[i / 2], 0, i % 2 ? 0x3424 : 0x1404);
      const uint32_t magnitude = spread >> 4 & 0x07f007f0;
      largest_ = __vmaxu2(largest_, magnitude);
      pairs[i] = times_2_to_the_120(spread & 0x80008000 | magnitude);
    }
  }

 private:
  static constexpr uint32_t kNaNMoved = 0x07f0;

  __device__ static uint32_t times_2_to_the_120(uint32_t pair) {
    uint32_t product;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(0x7b807b80));
    return product;
  }

  uint32_t largest_ = 0;  // of both halves, each for itself
};

}  // namespace lite_attention::sm90

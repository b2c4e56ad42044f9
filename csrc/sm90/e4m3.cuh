// FP8 E4M3 to 16 bits, exactly, NaN and subnormals included.
#pragma once

#include <cutlass/numeric_types.h>

#include <cstdint>
#include <type_traits>

namespace lite_attention::sm90 {

// Four values to two words of two.
template <class Element>
__device__ void from_e4m3(uint32_t bytes, uint32_t (&pairs)[2]) {
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}\n"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(bytes));
  // By way of float, for want of an instruction. Moving bits about instead takes half as long again: these go through
  // a pipe of half the width.
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
#pragma unroll
    for (uint32_t& pair : pairs) {
      asm("{\n"
          ".reg .b16 low, high;\n"
          ".reg .f32 first, second;\n"
          "mov.b32 {low, high}, %1;\n"
          "cvt.f32.f16 first, low;\n"
          "cvt.f32.f16 second, high;\n"
          "cvt.rn.bf16x2.f32 %0, second, first;\n"
          "}\n"
          : "=r"(pair)
          : "r"(pair));
    }
  }
}

}  // namespace lite_attention::sm90

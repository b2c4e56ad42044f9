// Powers of two, by the two units that can make them.
#pragma once

#include <cuda_runtime.h>

namespace lite_attention::sm90 {

// By the special function unit: one instruction of a warp takes it 8 cycles.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// By the FMA pipes, for x below 128: nine instructions, for which there is room while the other unit is busy
// (FlashAttention-4's idea for Blackwell). x is split into its nearest integer, which becomes the exponent, and a
// fraction, whose power is a polynomial, 1 at 0, of the least relative error: 1e-4 for degree 3 and 3e-6 for degree 4.
// From -127 down it is exactly 0, and NaN stays NaN.
template <int kDegree>
__device__ inline float exp2_polynomial(float x) {
  static_assert(kDegree == 3 || kDegree == 4, "there are coefficients of these degrees");
  asm("max.NaN.f32 %0, %0, 0fC2FE0000;" : "+f"(x));  // -127, whose exponent field is 0
  // Adding this leaves the integer, biased as an exponent is, in the lowest bits of the sum.
  constexpr float kToInteger = 1.5f * (1 << 23) + 127.f;
  const float shifted = x + kToInteger, fraction = x - (shifted - kToInteger);
  float power;
  if constexpr (kDegree == 3) {
    power = fmaf(fraction, 0.055008935f, 0.242210961f);
    power = fmaf(power, fraction, 0.693282926f);
  } else {
    power = fmaf(fraction, 0.009584325f, 0.055907520f);
    power = fmaf(power, fraction, 0.240240657f);
    power = fmaf(power, fraction, 0.693123978f);
  }
  power = fmaf(power, fraction, 1.f);
  return power * __int_as_float(__float_as_int(shifted) << 23);
}

}  // namespace lite_attention::sm90

// The approximate functions of the hardware: their error is far below that of what they are applied to.
#pragma once

namespace lite_attention::pages {

__device__ inline float exp2_approximate(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ inline float log2_approximate(float x) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

}  // namespace lite_attention::pages

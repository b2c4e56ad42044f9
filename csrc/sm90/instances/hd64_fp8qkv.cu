#include "sm90/fp8_qkv.cuh"

namespace lite_attention::sm90 {

template <>
Kernel fp8_qkv_kernel<64>(bool score_mod) {
  return select_fp8_qkv_kernel<64>(score_mod);
}

}  // namespace lite_attention::sm90

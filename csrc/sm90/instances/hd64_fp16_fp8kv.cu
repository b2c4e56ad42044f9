#include "sm90/fp8_kv.cuh"

namespace lite_attention::sm90 {

template <>
Kernel fp8_kv_kernel<ElementType::kHalf, 64>(TileKind kind, bool score_mod) {
  return select_fp8_kv_kernel<cutlass::half_t, 64>(kind, score_mod);
}

}  // namespace lite_attention::sm90

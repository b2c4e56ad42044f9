#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kBFloat16, 192>(TileKind kind, bool score_mod) {
  return select_kernel<cutlass::bfloat16_t, 192>(kind, score_mod);
}

}  // namespace lite_attention::sm90

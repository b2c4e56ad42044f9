#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kBFloat16, 96>(TileKind kind, bool score_mod) {
  return select_kernel<cutlass::bfloat16_t, 96>(kind, score_mod);
}

}  // namespace lite_attention::sm90

#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kHalf, 256>(TileKind kind, bool score_mod) {
  return select_kernel<cutlass::half_t, 256>(kind, score_mod);
}

}  // namespace lite_attention::sm90

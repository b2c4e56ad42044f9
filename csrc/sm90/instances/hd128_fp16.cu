#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kHalf, 128>(TileKind kind, bool score_mod) {
  return select_kernel<cutlass::half_t, 128>(kind, score_mod);
}

}  // namespace lite_attention::sm90

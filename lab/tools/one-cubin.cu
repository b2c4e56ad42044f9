#include "sm90/fwd.cuh"
namespace lite_attention::sm90 {
template Kernel make_kernel<cutlass::bfloat16_t, 128, TileKind::kDecode, false>();
}

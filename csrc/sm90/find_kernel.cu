#include "sm90/launch.h"

namespace lite_attention::sm90 {
namespace {

template <int kHeadDim>
Kernel by_element(ElementType element, TileKind kind, bool score_mod) {
  return element == ElementType::kBFloat16 ? kernel<ElementType::kBFloat16, kHeadDim>(kind, score_mod)
                                           : kernel<ElementType::kHalf, kHeadDim>(kind, score_mod);
}

}  // namespace

Kernel find_kernel(ElementType element, int head_dim, TileKind kind, bool score_mod) {
  if (head_dim <= 0 || head_dim % 8 != 0) return {};  // TMA walks 16-byte grains
  if (head_dim <= 64) return by_element<64>(element, kind, score_mod);
  if (head_dim <= 96) return by_element<96>(element, kind, score_mod);
  if (head_dim <= 128) return by_element<128>(element, kind, score_mod);
  if (head_dim <= 192) return by_element<192>(element, kind, score_mod);
  if (head_dim <= 256) return by_element<256>(element, kind, score_mod);
  return {};
}

}  // namespace lite_attention::sm90

#include "sm90/launch.h"

namespace lite_attention::sm90 {
namespace {

template <int kHeadDim>
Kernel by_element(ElementType element, KeyType keys, TileKind kind, bool score_mod) {
  if (keys == KeyType::kE4M3Queries) return fp8_qkv_kernel<kHeadDim>(score_mod);
  if (keys == KeyType::kE4M3) {
    return element == ElementType::kBFloat16 ? fp8_kv_kernel<ElementType::kBFloat16, kHeadDim>(kind, score_mod)
                                             : fp8_kv_kernel<ElementType::kHalf, kHeadDim>(kind, score_mod);
  }
  return element == ElementType::kBFloat16 ? kernel<ElementType::kBFloat16, kHeadDim>(kind, score_mod)
                                           : kernel<ElementType::kHalf, kHeadDim>(kind, score_mod);
}

}  // namespace

Kernel find_kernel(ElementType element, KeyType keys, int head_dim, TileKind kind, bool score_mod) {
  const int grain = keys == KeyType::kAsQueries ? 8 : 16;  // TMA walks 16 bytes
  if (head_dim <= 0 || head_dim % grain != 0) return {};
  if (head_dim <= 64) return by_element<64>(element, keys, kind, score_mod);
  if (head_dim <= 96) return by_element<96>(element, keys, kind, score_mod);
  if (head_dim <= 128) return by_element<128>(element, keys, kind, score_mod);
  if (head_dim <= 192) return by_element<192>(element, keys, kind, score_mod);
  if (head_dim <= 256) return by_element<256>(element, keys, kind, score_mod);
  return {};
}

}  // namespace lite_attention::sm90

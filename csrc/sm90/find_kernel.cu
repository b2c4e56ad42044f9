#include "sm90/launch.h"

namespace lite_attention::sm90 {

Kernel find_kernel(ElementType element, int head_dim, bool decode) {
  const bool bf16 = element == ElementType::kBFloat16;
  switch (head_dim) {
    case 64:
      return bf16 ? kernel<ElementType::kBFloat16, 64>(decode) : kernel<ElementType::kHalf, 64>(decode);
    case 128:
      return bf16 ? kernel<ElementType::kBFloat16, 128>(decode) : kernel<ElementType::kHalf, 128>(decode);
    default:
      return {};
  }
}

}  // namespace lite_attention::sm90

#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kBFloat16, 128>(bool decode) {
  using Prefill = Traits<cutlass::bfloat16_t, 128, false>;
  using Decode = Traits<cutlass::bfloat16_t, 128, true>;
  return decode ? Kernel{{Decode::kBlockM, Decode::kBlockN}, launch<Decode>}
                : Kernel{{Prefill::kBlockM, Prefill::kBlockN}, launch<Prefill>};
}

}  // namespace lite_attention::sm90

#include "sm90/fwd.cuh"

namespace lite_attention::sm90 {

template <>
Kernel kernel<ElementType::kHalf, 64>(bool decode) {
  using Prefill = Traits<cutlass::half_t, 64, false>;
  using Decode = Traits<cutlass::half_t, 64, true>;
  return decode ? Kernel{{Decode::kBlockM, Decode::kBlockN}, launch<Decode>}
                : Kernel{{Prefill::kBlockM, Prefill::kBlockN}, launch<Prefill>};
}

}  // namespace lite_attention::sm90

#include "sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace lite_attention::sm90 {
namespace {

constexpr int64_t kGrainBytes = 16;

struct Dimension {
  int64_t size, stride, box;
};

// libcuda is not linked: the library also loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found == cudaDriverEntryPointSuccess ? pointer
                                                                                                    : nullptr);
  }();
  return function;
}

CUresult encode(CUtensorMap& map, const MapSource& source, int box_columns, const Dimension (&outer)[3]) {
  if (!encoder()) return CUDA_ERROR_NOT_FOUND;
  const bool fp8 = source.fp8;
  const int64_t element_bytes = fp8 ? 1 : 2;
  cuuint64_t sizes[4] = {cuuint64_t(source.head_dim)}, strides[3];
  cuuint32_t box[4] = {cuuint32_t(box_columns)}, steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 3; ++i) {
    sizes[i + 1] = std::max<int64_t>(outer[i].size, 1);
    // Of one element only the base matters.
    strides[i] = outer[i].size <= 1 ? kGrainBytes : outer[i].stride * element_bytes;
    box[i + 1] = outer[i].box;
  }
  auto type = fp8                                        ? CU_TENSOR_MAP_DATA_TYPE_UINT8
              : source.element == ElementType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // A fetch into L2 should stay with its head: what lies beyond it is another head's, which a decode step reads at
  // another time or not at all. 128 bytes are what a box has of a row; decode at head_dim 128 read 5% less a second
  // (H200) when a fetch was of 256, the whole row, of which the second half is another box's.
  const int64_t apart = (source.heads > 1 ? source.strides.head : source.strides.token) * element_bytes;
  auto promotion = fp8 && apart % 128 != 0 ? CU_TENSOR_MAP_L2_PROMOTION_L2_64B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  const int64_t row_bytes = box_columns * element_bytes;
  auto swizzle = !source.swizzled   ? CU_TENSOR_MAP_SWIZZLE_NONE
                 : row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                 : row_bytes == 64  ? CU_TENSOR_MAP_SWIZZLE_64B
                                    : CU_TENSOR_MAP_SWIZZLE_32B;
  return encoder()(&map, type, 4, const_cast<void*>(source.data), sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace

CUresult make_q_map(CUtensorMap& map, const MapSource& q, int box_columns, int box_heads, int box_tokens) {
  return encode(
      map, q, box_columns,
      {{q.heads, q.strides.head, box_heads}, {q.tokens, q.strides.token, box_tokens}, {q.outer, q.strides.batch, 1}});
}

CUresult make_kv_map(CUtensorMap& map, const MapSource& kv, int box_columns, int box_tokens) {
  return encode(
      map, kv, box_columns,
      {{kv.tokens, kv.strides.token, box_tokens}, {kv.heads, kv.strides.head, 1}, {kv.outer, kv.strides.batch, 1}});
}

}  // namespace lite_attention::sm90

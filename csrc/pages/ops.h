// The parts of the page ops that a whole decode step (csrc/ops.cu) is made of as well. All check what they are given.
#pragma once

#include "pages/launch.h"
#include "torch_args.h"

namespace lite_attention::pages {

SketchParams sketch_params(const Tensor& k_cache, const Tensor& sketch, const Tensor& pages);

// What page_select is given beside its queries.
struct SelectArgs {
  Tensor sketch, bits, indices, counts, left_out, cu_seqlens_q, seqused_k, block_table;
  OptionalTensor k_descale;
  int64_t max_seqlen_q;
  double softmax_scale, eps;
  int64_t min_context, newest;
  OptionalTensor whole;
};
SelectParams select_params(const Tensor& q, const SelectArgs& args);

// Throws where the kernel that cuts lists has no room for calls of these shapes.
void check_fits(const SelectParams& params, int device);

// Whether any sequence of these shapes may leave pages out.
bool may_leave_out(const SelectParams& params);

// Launches what makes the lists; nothing where the batch is empty.
void select(const Tensor& q, SelectParams params, cudaStream_t stream);

}  // namespace lite_attention::pages

// The CUDA side of page_sketch and page_select, as csrc/ops.cu has it of attention.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>

#include "pages/format.cuh"
#include "pages/layout.cuh"
#include "pages/ops.h"

namespace lite_attention::pages {
namespace {

bool aligned_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

Sketches sketches_of(const Tensor& sketch, int64_t head_dim, int device) {
  STD_TORCH_CHECK(head_dim % 8 == 0 && head_dim > 0 && head_dim <= kMaxHeadDim,
                  "lite_attention: head_dim must be a multiple of 8 up to ", kMaxHeadDim, ", not ", head_dim);
  const int bits = sketch.dim() == 3 ? bits_of(int(head_dim), sketch.size(2)) : 0;
  bool fits = sketch.is_cuda() && sketch.get_device_index() == device && sketch.scalar_type() == ScalarType::Byte &&
              bits > 0 && sketch.stride(2) == 1 && aligned_16(sketch.data_ptr());
  for (int i = 0; fits && i < 2; ++i) fits = sketch.size(i) <= 1 || sketch.stride(i) % kAlignment == 0;
  STD_TORCH_CHECK(fits, "lite_attention: sketch must be a uint8 CUDA tensor (num_blocks, num_heads_k, ",
                  Format<12>::bytes(int(head_dim)), " or ", Format<8>::bytes(int(head_dim)),
                  ") with each sketch at a multiple of 16 bytes");
  return {static_cast<uint8_t*>(sketch.data_ptr()),
          sketch.stride(0),
          sketch.stride(1),
          int(sketch.size(0)),
          int(sketch.size(1)),
          int(head_dim),
          bits};
}

}  // namespace

SketchParams sketch_params(const Tensor& k_cache, const Tensor& sketch, const Tensor& pages) {
  const int device = k_cache.get_device_index();
  SketchParams params;
  const ScalarType type = k_cache.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Float8_e4m3fn,
                  "lite_attention: k_cache must be bfloat16, float16 or float8_e4m3fn");
  params.type = type == ScalarType::BFloat16 ? KeyType::kBFloat16
                : type == ScalarType::Half   ? KeyType::kHalf
                                             : KeyType::kE4M3;
  const int64_t grain = params.type == KeyType::kE4M3 ? kAlignment : kAlignment / 2;
  bool fits = k_cache.is_cuda() && k_cache.dim() == 4 && k_cache.size(1) == kPage && k_cache.stride(3) == 1 &&
              aligned_16(k_cache.data_ptr());
  for (int i = 0; fits && i < 3; ++i) fits = k_cache.size(i) <= 1 || k_cache.stride(i) % grain == 0;
  STD_TORCH_CHECK(fits, "lite_attention: k_cache (num_blocks, 16, num_heads_k, head_dim) needs a contiguous head_dim, ",
                  "16-byte alignment and strides in multiples of ", grain, " elements");
  params.sketches = sketches_of(sketch, k_cache.size(3), device);
  STD_TORCH_CHECK(params.sketches.num_blocks == k_cache.size(0) && params.sketches.heads_k == k_cache.size(2),
                  "lite_attention: sketch must have the pages and heads of k_cache");
  params.keys = k_cache.data_ptr();
  params.strides = {k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)};
  STD_TORCH_CHECK(pages.dim() == 1 && (pages.size(0) <= 1 || pages.stride(0) == 1),
                  "lite_attention: pages must be contiguous");
  params.pages = int_data(pages, "pages");
  params.count = params.sketches.num_blocks > 0 ? int(pages.size(0)) : 0;
  return params;
}

SelectParams select_params(const Tensor& q, const SelectArgs& args) {
  SelectParams params;
  STD_TORCH_CHECK(q.is_cuda() && q.dim() == 3 && q.stride(2) == 1 &&
                      (q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half),
                  "lite_attention: q must be a bfloat16 or float16 CUDA tensor (total_q, num_heads, head_dim)");
  params.bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  params.q = q.data_ptr();
  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.sketches = sketches_of(args.sketch, q.size(2), q.get_device_index());
  const Tensor& table = args.block_table;
  const int64_t batch = args.seqused_k.size(0), heads_k = params.sketches.heads_k;
  STD_TORCH_CHECK(heads_k > 0 && q.size(1) > 0 && q.size(1) % heads_k == 0,
                  "lite_attention: num_heads of q must be a multiple of those ", "of sketch");
  params.group = int(q.size(1) / heads_k);
  STD_TORCH_CHECK(args.max_seqlen_q * params.group <= kMaxQueries, "lite_attention: max_seqlen_q must be at most ",
                  kMaxQueries, " / (num_heads / num_heads_k), not ", args.max_seqlen_q);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == batch && (table.size(1) <= 1 || table.stride(1) == 1),
                  "lite_attention: block_table must be (batch, max_blocks) with contiguous rows");
  params.batch = int(batch);
  params.max_seqlen_q = int(args.max_seqlen_q);
  params.max_blocks = int(table.size(1));
  params.cu_seqlens_q =
      static_cast<const int*>(contiguous_data(args.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, {batch + 1}));
  params.seqused_k = static_cast<const int*>(contiguous_data(args.seqused_k, "seqused_k", ScalarType::Int, {batch}));
  params.block_table = int_data(table, "block_table");
  params.block_table_stride = table.stride(0);
  if (args.whole) {
    params.whole = static_cast<const bool*>(contiguous_data(*args.whole, "whole", ScalarType::Bool, {batch}));
  }
  params.k_descale = descale_of(args.k_descale, "k_descale", batch, heads_k);
  params.softmax_scale = float(args.softmax_scale);
  params.eps = float(args.eps);
  params.min_context = int(std::min<int64_t>(args.min_context, INT_MAX));
  params.newest = int(std::min<int64_t>(args.newest, INT_MAX));
  params.bits =
      static_cast<uint32_t*>(contiguous_data(args.bits, "bits", ScalarType::Int, {batch, heads_k, params.words()}));
  params.indices =
      static_cast<int*>(contiguous_data(args.indices, "indices", ScalarType::Int, {batch, heads_k, params.max_blocks}));
  params.counts = static_cast<int*>(contiguous_data(args.counts, "counts", ScalarType::Int, {batch, heads_k}));
  params.left_out = static_cast<float*>(
      contiguous_data(args.left_out, "left_out", ScalarType::Float, {batch, heads_k * params.group}));
  return params;
}

void check_fits(const SelectParams& params, int device) {
  STD_TORCH_CHECK(cut_fits(params, multiprocessors(device)), "lite_attention: block_table has ", params.max_blocks,
                  " pages a sequence, more than shared memory has room for beside ", params.group,
                  " query heads a KV head and ", params.batch * params.sketches.heads_k, " lists");
}

bool may_leave_out(const SelectParams& params) {
  return params.eps > 0 && int64_t{params.max_blocks} * kPage >= params.min_context && params.max_blocks > 0 &&
         params.max_seqlen_q > 0 && params.sketches.num_blocks > 0;
}

void select(const Tensor& q, SelectParams params, cudaStream_t stream) {
  if (params.batch == 0) return;
  const int device = q.get_device_index();
  const int64_t lists = int64_t{params.batch} * params.sketches.heads_k;
  // On PyTorch's allocator and this stream: alive until the launches.
  std::optional<Tensor> scratch;
  if (may_leave_out(params)) {
    const int64_t quads = lists * params.max_seqlen_q * params.quads();
    const int64_t scores = quads * params.max_blocks * kHeads, tiles = quads * params.tiles_of_list() * kHeads;
    scratch = torch::stable::new_empty(q, {scores + 2 * tiles + lists * params.max_blocks}, ScalarType::Float);
    params.scores = static_cast<float4*>(scratch->data_ptr());
    params.tiles = reinterpret_cast<float2*>(params.scores) + scores / 2;
    params.ranks = reinterpret_cast<uint32_t*>(params.tiles + tiles);
    check_cuda(launch_score(params, multiprocessors(device), stream), "launching the score kernel");
  } else if (params.listed) {
    check_cuda(launch_count(params, stream), "launching the count kernel");
    return;
  } else {
    params.eps = 0;  // nothing to estimate, or to estimate from
  }
  check_cuda(launch_cut(params, multiprocessors(device), stream), "launching the cut kernel");
}

namespace {

void page_sketch(Tensor k_cache, Tensor sketch, Tensor pages) {
  const int device = k_cache.get_device_index();
  const SketchParams params = sketch_params(k_cache, sketch, pages);
  if (params.count == 0) return;
  torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(launch_sketch(params, current_stream(device)), "launching the sketch kernel");
}

void page_select(Tensor q, Tensor sketch, Tensor bits, Tensor indices, Tensor counts, Tensor left_out,
                 Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, OptionalTensor k_descale,
                 int64_t max_seqlen_q, double softmax_scale, double eps, int64_t min_context, int64_t newest,
                 OptionalTensor whole) {
  const SelectArgs args{sketch,        bits,      indices,     counts,    left_out,
                        cu_seqlens_q,  seqused_k, block_table, k_descale, max_seqlen_q,
                        softmax_scale, eps,       min_context, newest,    whole};
  const int device = q.get_device_index();
  const SelectParams params = select_params(q, args);
  if (params.batch > 0) check_fits(params, device);
  torch::stable::accelerator::DeviceGuard guard(device);
  select(q, params, current_stream(device));
}

}  // namespace
}  // namespace lite_attention::pages

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CUDA, m) {
  m.impl("page_sketch", TORCH_BOX(&lite_attention::pages::page_sketch));
  m.impl("page_select", TORCH_BOX(&lite_attention::pages::page_select));
}

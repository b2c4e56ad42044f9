// The CUDA side of torch.ops.lite_attention, on PyTorch's stable ABI. Python (lite_attention/ops.py) owns the schemas
// and has checked what a caller can get wrong; the checks here keep a direct call of the op from reading memory that is
// not there.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <optional>

#include "pages/layout.cuh"
#include "pages/ops.h"
#include "sm90/launch.h"
#include "sm90/plan.cuh"
#include "sm90/tensor_map.h"
#include "torch_args.h"

namespace lite_attention {
namespace {

// Of a tensor with a value a head in its last dimension.
const float* head_data(const OptionalTensor& x, const char* name, int64_t heads) {
  if (!x) return nullptr;
  const int64_t last = x->dim() - 1;
  STD_TORCH_CHECK(x->is_cuda() && x->scalar_type() == ScalarType::Float, "lite_attention: ", name,
                  " must be a float32 CUDA tensor");
  STD_TORCH_CHECK(last >= 0 && x->size(last) == heads && (heads == 1 || x->stride(last) == 1), "lite_attention: ", name,
                  " must have ", heads, " contiguous elements in its last dimension");
  return static_cast<const float*>(x->data_ptr());
}

// Strides of a tensor whose last two dimensions are (heads, head_dim); `batched` says whether a batch, or a page,
// leads.
Strides strides_of(const Tensor& x, bool batched) {
  int64_t dims = x.dim();
  return {batched ? x.stride(0) : 0, x.stride(dims - 3), x.stride(dims - 2)};
}

void check_operand(const Tensor& x, const Tensor& q, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == q.get_device_index() && x.scalar_type() == type,
                  "lite_attention: ", name,
                  " must have the device of q and the dtype of q, or with k that of k; out is bfloat16 where q is FP8");
  const int64_t grain = type == ScalarType::Float8_e4m3fn ? 16 : 8;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(x.dim() - 1) == 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) aligned = aligned && (x.size(i) <= 1 || x.stride(i) % grain == 0);
  STD_TORCH_CHECK(aligned, "lite_attention: ", name,
                  " needs a contiguous head_dim, 16-byte alignment and strides in multiples of ", grain, " elements");
}

Descale descale_of(const OptionalTensor& x, const char* name, bool fp8, int64_t batch, int64_t heads_k) {
  STD_TORCH_CHECK(!x || fp8, "lite_attention: ", name, " is for float8_e4m3fn");
  return lite_attention::descale_of(x, name, batch, heads_k);
}

bool is_fp8(const Tensor& x) { return x.scalar_type() == ScalarType::Float8_e4m3fn; }

sm90::KeyType key_type(bool fp8_q, bool fp8_kv) {
  if (!fp8_kv) return sm90::KeyType::kAsQueries;
  return fp8_q ? sm90::KeyType::kE4M3Queries : sm90::KeyType::kE4M3;
}

struct Heads {
  int64_t q, k;
};

// Which tile serves a call, and how heads are packed into it. A function of what the plan and every launch that
// reads it have in common: shapes, mask, paging, what is FP8, and whether rows must be whole.
struct Selection {
  sm90::TileKind kind;
  sm90::Tile tile;
  Packing packing;

  Selection(sm90::KeyType keys, int64_t head_dim, Heads heads, int64_t max_seqlen_q, int64_t window_left,
            int64_t window_right, bool paged, bool whole_rows)
      : Selection(keys, head_dim, heads, std::min(group_of(heads), kRows),
                  kind_of(max_seqlen_q * group_of(heads), window_left, window_right, paged || whole_rows)) {}

  // Page lists are of KV heads, and of calls whose rows fit one tile.
  static Selection of_pages(sm90::KeyType keys, int64_t head_dim, Heads heads) {
    Selection selection(keys, head_dim, heads, std::min(group_of(heads), kRows), sm90::TileKind::kDecode);
    selection.packing.head_tiles /= int(heads.k);
    return selection;
  }

  // Skip lists are of query heads, which are not packed then.
  static Selection of_lists(int64_t head_dim, Heads heads) {
    return Selection(sm90::KeyType::kAsQueries, head_dim, heads, 1, sm90::TileKind::kSkip);
  }

 private:
  static constexpr int kRows = sm90::kRowsPerWarpgroup;

  static int group_of(Heads heads) { return int(heads.q / heads.k); }

  // kPaged walks keys as kDecode does: whole rows come out of both alike.
  static sm90::TileKind kind_of(int64_t rows, int64_t window_left, int64_t window_right, bool like_decode) {
    if (rows <= kRows) return sm90::TileKind::kDecode;
    if (like_decode) return sm90::TileKind::kPaged;
    return window_left < 0 && window_right < 0 ? sm90::TileKind::kFull : sm90::TileKind::kPrefill;
  }

  Selection(sm90::KeyType keys, int64_t head_dim, Heads heads, int most_packed, sm90::TileKind kind) : kind(kind) {
    const int group = group_of(heads);
    // Tiles are the same for both types of output, with and without score modifications.
    sm90::Kernel kernel = sm90::find_kernel(sm90::ElementType::kBFloat16, keys, int(head_dim), kind, false);
    STD_TORCH_CHECK(kernel.launch, "lite_attention: no kernel for head_dim ", head_dim);
    tile = kernel.tile;
    packing.pack = most_packed;
    while (group % packing.pack != 0) --packing.pack;
    packing.tokens_per_warpgroup = kRows / packing.pack;
    packing.tokens_per_tile = packing.tokens_per_warpgroup * (tile.block_m / kRows) * tile.cluster;
    packing.head_tiles = int(heads.q / packing.pack);
    packing.heads_per_kv = group;
  }
};

// Of the output, which is that of 16-bit queries.
sm90::ElementType element_of(const Tensor& out) {
  ScalarType type = out.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "lite_attention: q must be bfloat16 or float16, or float8_e4m3fn beside a bfloat16 out");
  return type == ScalarType::BFloat16 ? sm90::ElementType::kBFloat16 : sm90::ElementType::kHalf;
}

int64_t scheduler_metadata_size(int64_t batch, int64_t total_q, int64_t max_seqlen_q, int64_t num_heads,
                                int64_t num_heads_k, int64_t head_dim, int64_t device) {
  int64_t words = 0;
  for (bool paged : {false, true}) {  // may choose another tile
    for (sm90::KeyType keys : {sm90::KeyType::kAsQueries, sm90::KeyType::kE4M3, sm90::KeyType::kE4M3Queries}) {
      if (keys != sm90::KeyType::kAsQueries && head_dim % 16 != 0) continue;
      Selection selection(keys, head_dim, {num_heads, num_heads_k}, max_seqlen_q, -1, 0, paged, false);
      sm90::PlanBounds bounds(int(batch), total_q, selection.packing.tokens_per_tile, multiprocessors(int(device)),
                              selection.tile.cluster);
      words = std::max(words, bounds.words());
    }
  }
  return words;
}

// Of the M tiles of queries that there can be, each visits so many KV tiles at most.
int64_t most_tiles(const Lengths& lengths, int64_t max_seqlen_k, const Packing& packing, const sm90::Tile& tile) {
  const int64_t tiles = (max_seqlen_k + tile.block_n - 1) / tile.block_n;
  if (lengths.window_left < 0 || lengths.window_right < 0) return std::max<int64_t>(tiles, 1);
  // From the first key that the tile's first query sees to the last one of its last.
  const int64_t keys = int64_t{lengths.window_left} + lengths.window_right + packing.tokens_per_tile;
  return std::max<int64_t>(std::min(tiles, (keys + tile.block_n - 2) / tile.block_n + 1), 1);
}

// Makes a plan, which counts the KV tiles of all M tiles in 32 bits. The host knows bounds of the lengths alone.
void make_plan(const Tensor& plan, const sm90::PlanBounds& bounds, const Lengths& lengths, int64_t max_seqlen_k,
               const sm90::WholeSequences& whole, const Packing& packing, const sm90::Tile& tile, bool never_split,
               cudaStream_t stream) {
  const int64_t tiles = most_tiles(lengths, max_seqlen_k, packing, tile);
  STD_TORCH_CHECK(tiles <= INT_MAX / std::max(bounds.max_entries, 1), "lite_attention: max_seqlen_k: got ",
                  max_seqlen_k, ", with which up to ", bounds.max_entries, " tiles of queries visit up to ", tiles,
                  " tiles of keys each; needs at most ", INT_MAX,
                  " in all: a smaller max_seqlen_k where no sequence has so many keys, or a batch split into several");
  check_cuda(
      sm90::launch_plan(static_cast<int*>(plan.data_ptr()), bounds, lengths, whole, packing, tile, never_split, stream),
      "launching the plan");
}

sm90::WholeSequences whole_sequences(int64_t min_context, const OptionalTensor& whole, int64_t batch) {
  const void* marked = whole ? contiguous_data(*whole, "whole", ScalarType::Bool, {batch}) : nullptr;
  return {int(std::min<int64_t>(min_context, INT_MAX)), static_cast<const bool*>(marked)};
}

void get_scheduler_metadata(Tensor metadata, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                            OptionalTensor seqused_k, int64_t batch, int64_t total_q, int64_t max_seqlen_q,
                            int64_t max_seqlen_k, int64_t num_heads, int64_t num_heads_k, int64_t head_dim,
                            int64_t window_left, int64_t window_right, int64_t num_splits, bool paged, bool fp8_kv,
                            bool fp8_q, int64_t min_context, OptionalTensor whole) {
  int device = metadata.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Selection selection(key_type(fp8_q, fp8_kv), head_dim, {num_heads, num_heads_k}, max_seqlen_q, window_left,
                      window_right, paged, num_splits == 1);
  sm90::PlanBounds bounds(int(batch), total_q, selection.packing.tokens_per_tile, multiprocessors(device),
                          selection.tile.cluster);
  STD_TORCH_CHECK(metadata.is_cuda() && metadata.scalar_type() == ScalarType::Int &&
                      metadata.numel() >= bounds.words() && (metadata.dim() != 1 || metadata.stride(0) == 1),
                  "lite_attention: metadata must be a contiguous int32 CUDA tensor of at least ", bounds.words(),
                  " elements");
  Lengths lengths{int(batch),
                  int(batch > 0 ? total_q / batch : 0),
                  int(max_seqlen_k),
                  int_data(cu_seqlens_q, "cu_seqlens_q"),
                  int_data(cu_seqlens_k, "cu_seqlens_k"),
                  int_data(seqused_k, "seqused_k"),
                  int(window_left),
                  int(window_right)};
  make_plan(metadata, bounds, lengths, max_seqlen_k, whole_sequences(min_context, whole, batch), selection.packing,
            selection.tile, num_splits == 1, current_stream(device));
}

// What all forward ops are given.
struct Call {
  Tensor q, k, v, out, lse;
  OptionalTensor cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, scheduler_metadata;
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  int64_t window_left, window_right;
  OptionalTensor sinks;
  bool whole_rows;  // every row in one piece

  bool varlen_q() const { return cu_seqlens_q.has_value(); }
  bool paged() const { return block_table.has_value(); }
  bool k_batched() const { return !paged() && k.dim() == 4; }
  // No sequence has more keys.
  int64_t longest_k() const {
    if (k_batched()) return k.size(1);
    return paged() ? max_seqlen_k : std::min(max_seqlen_k, k.size(0));
  }
  int64_t batch() const { return varlen_q() ? cu_seqlens_q->size(0) - 1 : q.size(0); }
  int64_t total_q() const { return varlen_q() ? q.size(0) : q.size(0) * q.size(1); }
  Heads heads() const { return {q.size(q.dim() - 2), k.size(k.dim() - 2)}; }
  int64_t head_dim() const { return q.size(q.dim() - 1); }
  sm90::KeyType keys() const { return key_type(is_fp8(q), is_fp8(k)); }
  bool empty() const { return batch() == 0 || total_q() == 0 || heads().q == 0; }

  void check() const {
    const ScalarType type = q.scalar_type(), key_type = is_fp8(k) ? k.scalar_type() : type;
    check_operand(q, q, type, "q");
    check_operand(k, q, key_type, "k");
    check_operand(v, q, key_type, "v");
    check_operand(out, q, is_fp8(q) ? ScalarType::BFloat16 : type, "out");
    STD_TORCH_CHECK(lse.is_cuda() && lse.scalar_type() == ScalarType::Float,
                    "lite_attention: lse must be float32 on CUDA");
  }
};

void check_plan(const Tensor& plan, const sm90::PlanBounds& bounds) {
  int_data(plan, "scheduler_metadata");
  STD_TORCH_CHECK(plan.numel() >= bounds.entries(), "lite_attention: scheduler_metadata has ", plan.numel(),
                  " elements; get_scheduler_metadata makes more");
}

// `params` has what only some ops know: score modifications, descales, lists.
void attend(const Call& call, const Selection& selection, FwdParams& params) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const int device = q.get_device_index();
  cudaStream_t stream = current_stream(device);
  const bool varlen_q = call.varlen_q(), paged = call.paged();
  const bool k_batched = call.k_batched();
  const sm90::ElementType element = element_of(call.out);
  const int planned_heads = params.lengths.lists.heads;
  const sm90::PlanBounds bounds(int(call.batch()) * planned_heads, call.total_q() * planned_heads,
                                selection.packing.tokens_per_tile, multiprocessors(device), selection.tile.cluster);
  const sm90::KeyType keys = call.keys();
  const sm90::Kernel kernel =
      sm90::find_kernel(element, keys, int(call.head_dim()), selection.kind, params.score_mod.used());

  params.sinks = head_data(call.sinks, "sinks", call.heads().q);
  params.lengths = {int(call.batch()),
                    varlen_q ? 0 : int(q.size(1)),
                    int(call.longest_k()),
                    int_data(call.cu_seqlens_q, "cu_seqlens_q"),
                    int_data(call.cu_seqlens_k, "cu_seqlens_k"),
                    int_data(call.seqused_k, "seqused_k"),
                    int(call.window_left),
                    int(call.window_right),
                    params.lengths.lists};
  params.packing = selection.packing;
  params.num_workers = bounds.num_workers;
  params.head_dim = int(call.head_dim());
  params.out = call.out.data_ptr();
  params.out_strides = strides_of(call.out, !varlen_q);
  params.lse = static_cast<float*>(call.lse.data_ptr());
  params.lse_strides = varlen_q ? Strides{0, call.lse.stride(1), call.lse.stride(0)}
                                : Strides{call.lse.stride(0), call.lse.stride(2), call.lse.stride(1)};
  params.softmax_scale = float(call.softmax_scale);
  params.k_has_batch = k_batched;
  params.box_rows = kernel.tile.box_rows;
  if (paged) {
    const Tensor& table = *call.block_table;
    params.block_table = int_data(call.block_table, "block_table");
    STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == call.batch() && (table.size(1) <= 1 || table.stride(1) == 1),
                    "lite_attention: block_table must be (batch, max_blocks) with contiguous rows");
    params.block_table_stride = table.stride(0);
    params.table_pages = int(table.size(1));
    params.page_size = int(k.size(1));
    params.box_rows = std::gcd(params.page_size, kernel.tile.block_n);
    params.boxes_of_tile = kernel.tile.block_n / params.box_rows;
    params.boxes_of_page = params.page_size / params.box_rows;
    STD_TORCH_CHECK(params.page_size % 16 == 0, "lite_attention: page_size must be a multiple of 16, not ",
                    params.page_size);
  }

  const bool outer_k = paged || k_batched;
  auto source = [&](const Tensor& x, bool outer, bool swizzled) {
    // An empty tensor has no memory, and a descriptor wants an address even where no box is ever loaded through it.
    const void* data = x.numel() > 0 ? x.data_ptr() : q.data_ptr();
    return sm90::MapSource{data,
                           element,
                           is_fp8(x),
                           swizzled,
                           x.size(x.dim() - 3),
                           x.size(x.dim() - 2),
                           call.head_dim(),
                           outer ? x.size(0) : 1,
                           strides_of(x, outer)};
  };
  const int columns = kernel.tile.slab_columns;
  CUresult made = sm90::make_q_map(params.map_q, source(q, !varlen_q, true), columns, params.packing.pack,
                                   params.packing.tokens_per_warpgroup);
  auto make_kv = [&](CUtensorMap& map, const Tensor& x, bool converted) {
    if (made == CUDA_SUCCESS) made = sm90::make_kv_map(map, source(x, outer_k, !converted), columns, params.box_rows);
  };
  make_kv(params.map_k, k, keys == sm90::KeyType::kE4M3);
  make_kv(params.map_v, v, keys != sm90::KeyType::kAsQueries);
  STD_TORCH_CHECK(made == CUDA_SUCCESS, "lite_attention: cuTensorMapEncodeTiled failed with CUresult ", int(made));

  // Scratch comes from PyTorch's allocator, on this stream: calls on other streams and in other graphs have their own.
  std::optional<Tensor> plan = call.scheduler_metadata;
  if (plan) {
    check_plan(*plan, bounds);
  } else {
    plan = torch::stable::new_empty(q, {bounds.words()}, ScalarType::Int);
    make_plan(*plan, bounds, params.lengths, call.longest_k(), {}, params.packing, kernel.tile, call.whole_rows,
              stream);
  }
  params.plan = static_cast<int*>(plan->data_ptr());
  std::optional<Tensor> partial;  // alive until the launch
  if (!params.skip.bits) {
    const int64_t rows = int64_t{2} * bounds.num_workers * kernel.tile.cluster * kernel.tile.block_m;
    partial = torch::stable::new_empty(q, {rows * (kernel.tile.head_dim + 1)}, ScalarType::Float);
    params.partial_out = static_cast<float*>(partial->data_ptr());
    params.partial_lse = params.partial_out + rows * kernel.tile.head_dim;
  }
  check_cuda(kernel.launch(params, stream), "launching the forward kernel");
}

void fwd(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
         OptionalTensor seqused_k, OptionalTensor block_table, OptionalTensor scheduler_metadata, int64_t max_seqlen_q,
         int64_t max_seqlen_k, double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
         OptionalTensor alibi_slopes, OptionalTensor sinks, int64_t num_splits, OptionalTensor k_descale,
         OptionalTensor v_descale, OptionalTensor q_descale) {
  const Call call{q,
                  k,
                  v,
                  out,
                  lse,
                  cu_seqlens_q,
                  cu_seqlens_k,
                  seqused_k,
                  block_table,
                  scheduler_metadata,
                  max_seqlen_q,
                  max_seqlen_k,
                  softmax_scale,
                  window_left,
                  window_right,
                  sinks,
                  num_splits == 1};
  call.check();
  if (call.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  FwdParams params;
  params.score_mod = {float(softcap), head_data(alibi_slopes, "alibi_slopes", call.heads().q),
                      alibi_slopes && alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0};
  params.q_descale = descale_of(q_descale, "q_descale", is_fp8(q), call.batch(), call.heads().k);
  params.k_descale = descale_of(k_descale, "k_descale", is_fp8(k), call.batch(), call.heads().k);
  params.v_descale = descale_of(v_descale, "v_descale", is_fp8(v), call.batch(), call.heads().k);
  attend(call,
         Selection(call.keys(), call.head_dim(), call.heads(), max_seqlen_q, window_left, window_right, call.paged(),
                   call.whole_rows),
         params);
}

// A bit for every KV tile, in contiguous words.
uint32_t* tile_bits(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  return static_cast<uint32_t*>(contiguous_data(x, name, ScalarType::Int, sizes));
}

void skip_fwd(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor skip_list, Tensor threshold,
              OptionalTensor must_do, OptionalTensor must_skip, OptionalTensor cu_seqlens_q,
              OptionalTensor cu_seqlens_k, OptionalTensor seqused_k, OptionalTensor block_table, int64_t max_seqlen_q,
              int64_t max_seqlen_k, double softmax_scale, int64_t window_left, int64_t window_right,
              OptionalTensor sinks, int64_t block_m, int64_t block_n, bool update) {
  const Call call{q,
                  k,
                  v,
                  out,
                  lse,
                  cu_seqlens_q,
                  cu_seqlens_k,
                  seqused_k,
                  block_table,
                  std::nullopt,
                  max_seqlen_q,
                  max_seqlen_k,
                  softmax_scale,
                  window_left,
                  window_right,
                  sinks,
                  true};
  call.check();
  if (call.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  STD_TORCH_CHECK(call.keys() == sm90::KeyType::kAsQueries, "lite_attention: k must have the dtype of q");
  const Selection selection = Selection::of_lists(call.head_dim(), call.heads());
  STD_TORCH_CHECK(block_m == selection.tile.block_m && block_n == selection.tile.block_n,
                  "lite_attention: skip_list has tiles of ", block_m, " x ", block_n, "; the kernel for head_dim ",
                  call.head_dim(), " has ", selection.tile.block_m, " x ", selection.tile.block_n);
  STD_TORCH_CHECK(max_seqlen_k <= sm90::kMaxSkipTokens, "lite_attention: skip lists reach ", sm90::kMaxSkipTokens,
                  " keys, not ", max_seqlen_k);
  const int64_t batch = call.batch(), heads = call.heads().q;
  const int64_t q_tiles = (max_seqlen_q + block_m - 1) / block_m;
  const int64_t words = ((max_seqlen_k + block_n - 1) / block_n + 31) / 32;
  FwdParams params;
  params.skip.bits = tile_bits(skip_list, "skip_list", {batch, heads, q_tiles, words});
  params.skip.q_tiles = int(q_tiles);
  params.skip.words = int(words);
  params.skip.num_heads = int(heads);
  if (must_do) params.skip.must_do = tile_bits(*must_do, "must_do", {batch, words});
  if (must_skip) params.skip.must_skip = tile_bits(*must_skip, "must_skip", {batch, words});
  STD_TORCH_CHECK(threshold.is_cuda() && threshold.scalar_type() == ScalarType::Float &&
                      (threshold.numel() == 1 || (threshold.dim() == 1 && threshold.size(0) == heads)),
                  "lite_attention: threshold must be a float32 CUDA tensor of one element or one a head");
  params.skip.threshold = static_cast<const float*>(threshold.data_ptr());
  params.skip.threshold_stride = threshold.numel() == 1 ? 0 : int(threshold.stride(0));
  params.skip.update = update;
  attend(call, selection, params);
}

// The plan of a step that was given none.
Tensor step_plan(const Call& call, const Selection& selection, int64_t min_context, const OptionalTensor& whole) {
  const int device = call.q.get_device_index();
  const int64_t batch = call.batch(), total_q = call.total_q();
  Tensor plan = torch::stable::new_empty(call.q,
                                         {scheduler_metadata_size(batch, total_q, call.max_seqlen_q, call.heads().q,
                                                                  call.heads().k, call.head_dim(), device)},
                                         ScalarType::Int);
  get_scheduler_metadata(plan, call.cu_seqlens_q, std::nullopt, call.seqused_k, batch, total_q, call.max_seqlen_q,
                         call.max_seqlen_k, call.heads().q, call.heads().k, call.head_dim(), -1, 0, 0, true,
                         is_fp8(call.k), false, min_context, whole);
  return plan;
}

// What of a call over page lists is the same with and without the step around it.
FwdParams page_params(const Call& call, const OptionalTensor& k_descale, const OptionalTensor& v_descale) {
  const Heads heads = call.heads();
  STD_TORCH_CHECK(!is_fp8(call.q), "lite_attention: page lists are for bfloat16 and float16 queries");
  STD_TORCH_CHECK(call.max_seqlen_q * heads.q <= sm90::kRowsPerWarpgroup * heads.k,
                  "lite_attention: max_seqlen_q must be at most ", sm90::kRowsPerWarpgroup,
                  " / (num_heads / num_heads_k), not ", call.max_seqlen_q);
  FwdParams params;
  params.k_descale = descale_of(k_descale, "k_descale", is_fp8(call.k), call.batch(), heads.k);
  params.v_descale = descale_of(v_descale, "v_descale", is_fp8(call.v), call.batch(), heads.k);
  return params;
}

PageLists page_lists(const Call& call, const Tensor& indices, const Tensor& counts) {
  const int64_t heads = call.heads().k, max_pages = call.block_table->size(1);
  PageLists lists;
  lists.indices =
      static_cast<const int*>(contiguous_data(indices, "indices", ScalarType::Int, {call.batch(), heads, max_pages}));
  lists.counts = static_cast<const int*>(contiguous_data(counts, "counts", ScalarType::Int, {call.batch(), heads}));
  lists.heads = int(heads);
  lists.max_pages = int(max_pages);
  lists.page_size = int(call.k.size(1));
  return lists;
}

// Decode over pages, in a step or over lists that there are.
Call page_call(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& out, const Tensor& lse,
               const Tensor& cu_seqlens_q, const Tensor& seqused_k, const Tensor& block_table, int64_t max_seqlen_q,
               double softmax_scale, const OptionalTensor& sinks, int64_t num_splits) {
  return {q,
          k_cache,
          v_cache,
          out,
          lse,
          cu_seqlens_q,
          std::nullopt,
          seqused_k,
          block_table,
          std::nullopt,
          max_seqlen_q,
          block_table.size(1) * k_cache.size(1),
          softmax_scale,
          -1,
          0,
          sinks,
          num_splits == 1};
}

void page_attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor out, Tensor lse, Tensor indices, Tensor counts,
                 Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, int64_t max_seqlen_q, double softmax_scale,
                 OptionalTensor sinks, OptionalTensor k_descale, OptionalTensor v_descale, int64_t num_splits) {
  const Call call = page_call(q, k_cache, v_cache, out, lse, cu_seqlens_q, seqused_k, block_table, max_seqlen_q,
                              softmax_scale, sinks, num_splits);
  call.check();
  if (call.empty()) return;
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  FwdParams params = page_params(call, k_descale, v_descale);
  params.lengths.lists = page_lists(call, indices, counts);
  attend(call, Selection::of_pages(call.keys(), call.head_dim(), call.heads()), params);
}

// A decode step: sketches, lists, and attention over them, by kernels of one op (dependent_launch.cuh).
void page_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor sketch, OptionalTensor filled, Tensor out, Tensor lse,
                 Tensor bits, Tensor indices, Tensor counts, Tensor left_out, Tensor cu_seqlens_q, Tensor seqused_k,
                 Tensor block_table, OptionalTensor k_descale, OptionalTensor v_descale, int64_t max_seqlen_q,
                 double softmax_scale, double eps, int64_t min_context, int64_t newest, OptionalTensor whole,
                 OptionalTensor sinks, OptionalTensor scheduler_metadata, int64_t num_splits) {
  Call call = page_call(q, k_cache, v_cache, out, lse, cu_seqlens_q, seqused_k, block_table, max_seqlen_q,
                        softmax_scale, sinks, num_splits);
  call.scheduler_metadata = scheduler_metadata;
  call.check();
  const int device = q.get_device_index();
  const pages::SelectArgs args{sketch,        bits,      indices,     counts,    left_out,
                               cu_seqlens_q,  seqused_k, block_table, k_descale, max_seqlen_q,
                               softmax_scale, eps,       min_context, newest,    whole};
  pages::SelectParams select = pages::select_params(q, args);
  pages::SketchParams sketches;
  if (filled) sketches = pages::sketch_params(k_cache, sketch, *filled);
  FwdParams params = page_params(call, k_descale, v_descale);
  const PageLists lists = page_lists(call, indices, counts);
  STD_TORCH_CHECK(lists.page_size == pages::kPage, "lite_attention: k_cache must have pages of ", pages::kPage,
                  " tokens, not ", lists.page_size);
  torch::stable::accelerator::DeviceGuard guard(device);
  cudaStream_t stream = current_stream(device);
  const bool whole_rows = call.whole_rows, empty = call.empty();
  const Selection selection =
      whole_rows ? Selection::of_pages(call.keys(), call.head_dim(), call.heads())
                 : Selection(call.keys(), call.head_dim(), call.heads(), max_seqlen_q, -1, 0, true, false);
  if (whole_rows) {
    params.lengths.lists = lists;  // dealt by a plan of their own
    call.scheduler_metadata = std::nullopt;
  } else if (!empty) {
    if (!call.scheduler_metadata) call.scheduler_metadata = step_plan(call, selection, min_context, whole);
    check_plan(*call.scheduler_metadata,
               sm90::PlanBounds(int(call.batch()), call.total_q(), selection.packing.tokens_per_tile,
                                multiprocessors(device), selection.tile.cluster));
    select.listed = sm90::Plan::listed(int_data(call.scheduler_metadata, "scheduler_metadata"));
    params.in_step = true;
    if (pages::may_leave_out(select)) params.step_lists = lists;
  }
  if (select.batch > 0 && (!select.listed || pages::may_leave_out(select))) pages::check_fits(select, device);
  if (sketches.count > 0) {
    check_cuda(pages::launch_sketch(sketches, stream), "launching the sketch kernel");
    select.after_sketch = select.listed != nullptr;
  }
  pages::select(q, select, stream);
  if (!empty) attend(call, selection, params);
}

}  // namespace
}  // namespace lite_attention

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CUDA, m) {
  m.impl("fwd", TORCH_BOX(&lite_attention::fwd));
  m.impl("skip_fwd", TORCH_BOX(&lite_attention::skip_fwd));
  m.impl("page_attend", TORCH_BOX(&lite_attention::page_attend));
  m.impl("page_decode", TORCH_BOX(&lite_attention::page_decode));
  m.impl("get_scheduler_metadata", TORCH_BOX(&lite_attention::get_scheduler_metadata));
}

STABLE_TORCH_LIBRARY_IMPL(lite_attention, CompositeExplicitAutograd, m) {
  m.impl("scheduler_metadata_size", TORCH_BOX(&lite_attention::scheduler_metadata_size));
}

// Everything a launch of the forward kernel needs, by value: host code fills it, device code reads it from constant
// memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace lite_attention {

// How a tensor is walked, in elements. The head dimension is always contiguous.
struct Strides {
  int64_t batch = 0;  // zero for packed variable-length tensors
  int64_t token = 0;
  int64_t head = 0;
};

// Which pages of a sequence each KV head attends to, or all of them where `indices` is null. What the plan calls a
// sequence is one KV head of one then, and its keys are those of the listed pages, counted anew from 0. The last ones
// keep their distance from the end, so that the causal mask stays what it was.
struct PageLists {
  const int* indices = nullptr;  // (batch, heads, max_pages): pages of the sequence, ascending
  const int* counts = nullptr;   // (batch, heads)
  int heads = 1;                 // num_heads_k
  int max_pages = 0;
  int page_size = 0;
};

// Which queries and keys belong to which sequence. Exactly one of the three key layouts is in use:
// (batch, seqlen, ...), packed by cu_seqlens_k, or pages named by block_table.
struct Lengths {
  int batch = 0;
  int seqlen_q = 0;                   // of every sequence, where cu_seqlens_q is null
  int seqlen_k = 0;                   // of every sequence, where neither cu_seqlens_k nor seqused_k is given
  const int* cu_seqlens_q = nullptr;  // (batch + 1)
  const int* cu_seqlens_k = nullptr;  // (batch + 1)
  const int* seqused_k = nullptr;     // (batch), the keys of each sequence that exist; wins over cu_seqlens_k
  int window_left = -1;               // keys a query sees to its left and right on the diagonal that is
  int window_right = -1;              // aligned to the bottom right; -1 is unbounded, causal is right = 0
  PageLists lists;

  // What the plan calls sequences.
  __host__ __device__ int planned() const { return batch * lists.heads; }
};

// How the rows of an M tile map to (query token, query head): `pack` heads of one KV head side by side for each token.
// Every consumer warpgroup has whole tokens of its own, so that it can load its queries without the others.
struct Packing {
  int pack = 1;
  int tokens_per_warpgroup = 0;  // 64 / pack; rows past tokens_per_warpgroup * pack are idle
  int tokens_per_tile = 0;       // tokens_per_warpgroup * warpgroups of all blocks of a cluster
  int head_tiles = 0;            // num_heads / pack, of one KV head where lists are of KV heads
  int heads_per_kv = 1;          // num_heads / num_heads_k

  // Without a division where a pack has all heads of a KV head, as a rule in decode.
  __device__ int kv_head(int head_tile) const {
    return pack == heads_per_kv ? head_tile : head_tile * pack / heads_per_kv;
  }
};

// What happens to a scaled score before the softmax: softcap * tanh(score / softcap), then ALiBi's
// -slope * |query - key|.
struct ScoreMod {
  float softcap = 0.f;            // zero is none
  const float* slopes = nullptr;  // (num_heads) or (batch, num_heads); null is none
  int64_t slopes_batch_stride = 0;

  bool used() const { return softcap > 0.f || slopes; }
};

// Which KV tiles each tile of queries visits, one bit a tile, for every query head. Where `bits` is null all are
// visited.
struct SkipList {
  uint32_t* bits = nullptr;  // (batch, num_heads, q_tiles, words): tile n is bit n % 32 of word n / 32
  int q_tiles = 0;
  int words = 0;
  int num_heads = 0;
  const uint32_t* must_do = nullptr;    // (batch, words), visited whatever the list says; may be null
  const uint32_t* must_skip = nullptr;  // (batch, words), not visited, and none of must_do; may be null
  const float* threshold = nullptr;     // (num_heads) or one for all, in log2
  int threshold_stride = 0;             // 1 or 0
  bool update = false;                  // tiles that proved negligible leave the list
};

// What a stored value is multiplied by, one factor for each KV head of each sequence.
struct Descale {
  const float* factors = nullptr;  // null is 1
  int64_t batch_stride = 0, head_stride = 0;
};

struct FwdParams {
  CUtensorMap map_q, map_k, map_v;

  Lengths lengths;
  Packing packing;
  int* plan = nullptr;  // the scheduler metadata: sm90/plan.cuh
  int num_workers = 0;  // clusters, or blocks where there are none

  int head_dim = 0;  // at most the kernel's; columns past it are zeros in shared memory and not stored
  void* out = nullptr;
  float* lse = nullptr;
  Strides out_strides, lse_strides;

  const int* block_table = nullptr;  // (batch, max_blocks); null where K and V are not paged
  int64_t block_table_stride = 0;
  int table_pages = 0;  // of a sequence
  int page_size = 0;
  int box_rows = 0;       // rows of one TMA box of K or V
  int boxes_of_tile = 1;  // of pages: kBlockN / box_rows
  int boxes_of_page = 1;  // page_size / box_rows

  bool k_has_batch = false;  // K and V are (batch, seqlen, ...): the batch is a coordinate of its own

  float softmax_scale = 1.f;
  ScoreMod score_mod;
  const float* sinks = nullptr;  // (num_heads) logits of a key without a value, or null

  float* partial_out = nullptr;  // (2 * num_workers, kCluster * kBlockM, kHeadDim), normalised
  float* partial_lse = nullptr;  // (2 * num_workers, kCluster * kBlockM)

  Descale k_descale, v_descale;  // of FP8 keys and values

  SkipList skip;

  // One of the kernels of a decode step. Its lists, where the step may have any, the workers deal among themselves if
  // the plan says that any sequence has one; those in `lengths` the plan deals.
  bool in_step = false;
  PageLists step_lists;

  Descale q_descale;  // of FP8 queries, a factor for each KV head
};

}  // namespace lite_attention

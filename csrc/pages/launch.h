// The kernels of page lists, as host code sees them. What they compute: lite_attention/pages/reference.py.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace lite_attention::pages {

enum class KeyType { kBFloat16, kHalf, kE4M3 };

constexpr int kHeads = 4;  // query heads that are estimated together
constexpr int kTile = 16;  // pages, likewise

// The sketches of a cache. Strides in bytes, multiples of 16.
struct Sketches {
  uint8_t* data = nullptr;
  int64_t page_stride = 0, head_stride = 0;
  int num_blocks = 0, heads_k = 0, head_dim = 0;
  int bits = 12;  // of a channel: format.cuh
};

struct SketchParams {
  const void* keys = nullptr;  // (num_blocks, 16, heads_k, head_dim); Strides::batch is of pages
  KeyType type = KeyType::kBFloat16;
  Strides strides;
  Sketches sketches;
  const int* pages = nullptr;  // those to write, count of them; negative ones are none
  int count = 0;
};

cudaError_t launch_sketch(const SketchParams& params, cudaStream_t stream);

struct SelectParams {
  const void* q = nullptr;  // (total_q, heads, head_dim), 16-bit
  bool bfloat16 = true;
  int64_t q_token_stride = 0, q_head_stride = 0;
  int group = 1;  // query heads of a KV head
  Sketches sketches;
  Descale k_descale;

  int batch = 0, max_seqlen_q = 0, max_blocks = 0;
  const int* cu_seqlens_q = nullptr;  // (batch + 1)
  const int* seqused_k = nullptr;     // (batch)
  const int* block_table = nullptr;   // (batch, max_blocks)
  int64_t block_table_stride = 0;
  const bool* whole = nullptr;  // (batch) or null

  // Of a decode step, the plan's word that says whether any sequence has a list; else null.
  const int* listed = nullptr;
  // The kernel before writes sketches, and they alone are to be waited for.
  bool after_sketch = false;

  float softmax_scale = 1.f;
  float eps = 0.f;
  int min_context = 0, newest = 1;

  // (batch, heads_k, max_seqlen_q, quads(), max_blocks): for every page the log-masses, to base 2, of four query heads
  // side by side, which become shares of mass while the cut is sought.
  float4* scores = nullptr;
  // (batch, heads_k, max_seqlen_q, quads(), tiles_of_list(), kHeads): the largest log-mass of a tile's pages that the
  // token sees, and their masses beside it. They make the sum of masses the same however the cut is divided.
  float2* tiles = nullptr;
  uint32_t* ranks = nullptr;  // (batch, heads_k, max_blocks), where shared memory has no room
  int cut_room = 0;           // bytes of a block's shared memory for shares and ranks

  uint32_t* bits = nullptr;   // (batch, heads_k, words)
  int* indices = nullptr;     // (batch, heads_k, max_blocks)
  int* counts = nullptr;      // (batch, heads_k)
  float* left_out = nullptr;  // (batch, heads_k * group)

  __host__ __device__ int quads() const { return (group + kHeads - 1) / kHeads; }
  __host__ __device__ int words() const { return (max_blocks + 31) / 32; }
  __host__ __device__ int tiles_of_list() const { return (max_blocks + kTile - 1) / kTile; }
};

// Log-masses of full pages of all sequences that don't list everything.
cudaError_t launch_score(const SelectParams& params, int multiprocessors, cudaStream_t stream);
// Lists from them, where a block's shared memory has room for what it needs at least.
bool cut_fits(const SelectParams& params, int multiprocessors);
cudaError_t launch_cut(SelectParams params, int multiprocessors, cudaStream_t stream);
// Instead of both where a decode step can't leave anything out.
cudaError_t launch_count(const SelectParams& params, cudaStream_t stream);

}  // namespace lite_attention::pages

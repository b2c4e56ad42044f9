// The forward kernels that are compiled in, as host code sees them. No CUTLASS here: ops.cu stays quick to compile.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace lite_attention::sm90 {

enum class ElementType { kBFloat16, kHalf };

// How K and V are stored: in the type of the queries, which is that of the output; as FP8 that a warpgroup of the
// kernel makes 16 bits of; or as FP8 beside queries that are FP8 too, where only V becomes 16 bits.
enum class KeyType { kAsQueries, kE4M3, kE4M3Queries };

// Rows of one wgmma, which are the rows of a warpgroup.
constexpr int kRowsPerWarpgroup = 64;

// The longest sequence that a skip list can have.
constexpr int kMaxSkipTokens = 1 << 20;

// Which tile shape a call uses: prefill under a mask, prefill where every query sees every key, prefill over pages, or
// few queries; kSkip is the one whose tiles skip lists count.
enum class TileKind { kPrefill, kFull, kPaged, kDecode, kSkip };

// What host code must know of a kernel's tile.
struct Tile {
  int head_dim;  // columns in shared memory; a call's head_dim may be less
  int block_m, block_n;
  int cluster;       // blocks that work on neighbouring rows and share their keys
  int slab_columns;  // columns of one TMA box
  int box_rows;      // its rows, where keys are not paged
};

struct Kernel {
  Tile tile;
  cudaError_t (*launch)(const FwdParams&, cudaStream_t);
};

// One definition a file in sm90/instances/: a head dim and an element type, with its tile kinds, each without and with
// the score modifications of ScoreMod.
template <ElementType kElement, int kHeadDim>
Kernel kernel(TileKind kind, bool score_mod);

// The same over keys and values in FP8 E4M3.
template <ElementType kElement, int kHeadDim>
Kernel fp8_kv_kernel(TileKind kind, bool score_mod);

// Over queries in it as well: one kernel for all tile kinds, with bfloat16 output.
template <int kHeadDim>
Kernel fp8_qkv_kernel(bool score_mod);

// The kernel with the smallest head dim that holds head_dim; null `launch` where there is none.
Kernel find_kernel(ElementType element, KeyType keys, int head_dim, TileKind kind, bool score_mod);

}  // namespace lite_attention::sm90

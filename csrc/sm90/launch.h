// The forward kernels that are compiled in, as host code sees them. No CUTLASS here: ops.cu stays quick to compile.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace lite_attention::sm90 {

enum class ElementType { kBFloat16, kHalf };

// What host code must know of a kernel's tile.
struct Tile {
  int block_m, block_n;
};

struct Kernel {
  Tile tile;
  cudaError_t (*launch)(const FwdParams&, cudaStream_t);
};

// One definition a file in sm90/instances/: a head dim and an element type, its prefill and its decode tile.
template <ElementType kElement, int kHeadDim>
Kernel kernel(bool decode);

// Null `launch` where the combination is not compiled in.
Kernel find_kernel(ElementType element, int head_dim, bool decode);

}  // namespace lite_attention::sm90

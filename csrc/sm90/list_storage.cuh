// What a block of a kernel with skip lists keeps of them in shared memory (skip_list.cuh).
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "sm90/launch.h"

namespace lite_attention::sm90 {

// One buffer is read by the consumers while the next is filled.
template <bool kUsed, int kBlockN>
struct ListStorage {
  static constexpr int kBuffers = 2;
  static constexpr int kMaxWords = (kMaxSkipTokens / kBlockN + 31) / 32 + 1;

  struct Item {
    uint32_t* row;  // where the list lies in device memory
    int word_begin, word_end;
    int first;  // the tile visited first
    int tiles;  // how many are visited
    float threshold;
  };

  cutlass::arch::ClusterBarrier left[kBuffers];  // all warps are done with the buffer's item
  Item items[kBuffers];
  uint32_t visits[kBuffers][kMaxWords];  // only the words of the item's range are written
  uint32_t votes[kBuffers][kMaxWords];   // the tiles that any warp found worth staying
};
template <int kBlockN>
struct ListStorage<false, kBlockN> {};

}  // namespace lite_attention::sm90

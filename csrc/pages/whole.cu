#include "pages/whole.cuh"

#include "dependent_launch.cuh"

namespace lite_attention::pages {
namespace {

constexpr int kThreads = 256, kMostBlocks = 8;

__global__ __launch_bounds__(kThreads) void count_kernel(const __grid_constant__ SelectParams params) {
  if (!params.after_sketch) wait_for_kernels_before();
  let_next_kernel_wait();
  count_all(params, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  end_after_kernels_before();
}

}  // namespace

cudaError_t launch_count(const SelectParams& params, cudaStream_t stream) {
  const int values = params.batch * params.sketches.heads_k * params.group;
  const int blocks = (values + kThreads - 1) / kThreads;
  return launch_dependent(count_kernel, blocks < kMostBlocks ? blocks : kMostBlocks, kThreads, 0, stream, 1, params);
}

}  // namespace lite_attention::pages

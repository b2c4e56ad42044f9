// Programmatic dependent launch: a kernel begins while the one before it on the stream still runs, and waits for its
// end where it needs something of it. Between small kernels the setting up is as long as the work.
//
// The kernels of one op may go further. The first waits, in every block, before it lets the next begin. So what was
// there before the op is there for all of them, and what only kernels before it used may be written. For each other's
// results they wait. One that has not waited when it ends does so then in one block: that it has ended would not say
// that those before it have.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace lite_attention {

// Before anything that an earlier kernel may have written is read, or may still read is written, by every thread.
__device__ inline void wait_for_kernels_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// From here on the blocks of the next kernel may take their places beside this one's, to wait there.
__device__ inline void let_next_kernel_wait() { asm volatile("griddepcontrol.launch_dependents;"); }

// At the end of a kernel that did not have to wait for those before it.
__device__ inline void end_after_kernels_before() {
  if (blockIdx.x == 0 && threadIdx.x == 0) wait_for_kernels_before();
}

template <class... Params, class... Args>
cudaError_t launch_dependent(void (*kernel)(Params...), dim3 grid, dim3 block, int smem_bytes, cudaStream_t stream,
                             int cluster, Args&&... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace lite_attention

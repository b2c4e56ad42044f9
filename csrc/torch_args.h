// What the ops have in common: they run on PyTorch's stream, and trust no tensor that they can't see.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>

#include "params.h"

// Declared in the shim header only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace lite_attention {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "lite_attention: no CUDA stream on device ",
                  device);
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "lite_attention: ", what, ": ", cudaGetErrorString(error));
}

inline int multiprocessors(int device) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "reading the number of multiprocessors");
  return count;
}

inline const int* int_data(const OptionalTensor& x, const char* name) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_cuda() && x->scalar_type() == ScalarType::Int, "lite_attention: ", name,
                  " must be an int32 CUDA tensor");
  return static_cast<const int*>(x->data_ptr());
}

// Memory of a contiguous tensor of these sizes.
inline void* contiguous_data(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool fits = x.is_cuda() && x.scalar_type() == type && x.dim() == int64_t(sizes.size());
  int64_t stride = 1;
  for (int64_t i = x.dim() - 1; fits && i >= 0; --i) {
    fits = x.size(i) == sizes.begin()[i] && (x.size(i) == 1 || x.stride(i) == stride);
    stride *= x.size(i) > 1 ? x.size(i) : 1;
  }
  STD_TORCH_CHECK(fits, "lite_attention: ", name,
                  " must be a contiguous CUDA tensor of the op's dtype and of the call's ",
                  "batch, heads and tiles or pages");
  return x.data_ptr();
}

// A factor a sequence and KV head, in memory of any strides.
inline Descale descale_of(const OptionalTensor& x, const char* name, int64_t batch, int64_t heads_k) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cuda() && x->scalar_type() == ScalarType::Float && x->dim() == 2 && x->size(0) == batch &&
                      x->size(1) == heads_k,
                  "lite_attention: ", name, " must be a float32 CUDA tensor (batch, num_heads_k)");
  return {static_cast<const float*>(x->data_ptr()), x->stride(0), x->stride(1)};
}

}  // namespace lite_attention

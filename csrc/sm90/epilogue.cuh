// From registers to memory: the finished rows of a tile, or one part of a tile that several blocks share.
//
// The parts of a tile are added by the block that finishes last, always in the order of their keys, so the result does
// not depend on which block that is. A second launch for the sums would cost more than they do.
#pragma once

#include "sm90/scheduler.cuh"
#include "sm90/sequence.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

// Transposes a 4 x 4 matrix of words over the four threads of a quad: word k of thread t becomes word t of thread k.
__device__ inline void quad_transpose(uint32_t (&w)[4]) {
  int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    bool upper = lane & bit;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k & bit) continue;
      uint32_t received = __shfl_xor_sync(~0u, upper ? w[k] : w[k | bit], bit);
      (upper ? w[k] : w[k | bit]) = received;
    }
  }
}

template <class Traits>
class Epilogue {
  using Element = typename Traits::Element;

 public:
  __device__ Epilogue(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work,
                      const Sequence& seq, int row)
      : params_(params), smem_(smem), work_(work), row_(row) {
    const Packing& packing = params.packing;
    const int first_token = work.m_tile * packing.tokens_per_tile;
    rows_ = min(packing.tokens_per_tile, seq.seqlen_q - first_token) * packing.pack;
    int batch = params.lengths.cu_seqlens_q ? 0 : work.batch;
    int64_t token0 = int64_t{seq.q_begin} + first_token, head0 = work.head_tile * packing.pack;
    out_ = static_cast<Element*>(params.out) + batch * params.out_strides.batch + token0 * params.out_strides.token +
           head0 * params.out_strides.head;
    lse_ = params.lse + batch * params.lse_strides.batch + token0 * params.lse_strides.token +
           head0 * params.lse_strides.head;
  }

  // Rows that see no key: zeros, and -inf for the log-sum-exp.
  __device__ void store_nothing_seen() const {
    constexpr int kVectors = Traits::kHeadDim / 8;
    int thread = threadIdx.x - 128;
    for (int i = thread; i < rows_ * kVectors; i += Traits::kConsumerThreads) {
      *reinterpret_cast<uint4*>(out_row(i / kVectors) + i % kVectors * 8) = make_uint4(0, 0, 0, 0);
    }
    for (int i = thread; i < rows_; i += Traits::kConsumerThreads) *lse_row(i) = -INFINITY;
  }

  template <class Output>
  __device__ void store(const Output& output, const float (&lse)[2]) const {
    if (work_.parts == 1) {
      store_final(output, lse);
    } else {
      store_part(output, lse);
      if (arrived_last()) combine();
    }
  }

 private:
  __device__ Element* out_row(int row) const {
    int token = row / params_.packing.pack, head = row - token * params_.packing.pack;
    return out_ + token * params_.out_strides.token + head * params_.out_strides.head;
  }
  __device__ float* lse_row(int row) const {
    int token = row / params_.packing.pack, head = row - token * params_.packing.pack;
    return lse_ + token * params_.lse_strides.token + head * params_.lse_strides.head;
  }

  // A quad holds a row; after the transpose each of its threads writes 16 bytes of every 64.
  template <class Output>
  __device__ void store_final(const Output& output, const float (&lse)[2]) const {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    int quad_lane = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = row_ + 8 * i;
      Element* to = row < rows_ ? out_row(row) : nullptr;
#pragma unroll
      for (int group = 0; group < Traits::kHeadDim / 32; ++group) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          int v = 4 * group + k;
          auto pair = convert(cutlass::Array<float, 2>{output(4 * v + 2 * i), output(4 * v + 2 * i + 1)});
          words[k] = reinterpret_cast<const uint32_t&>(pair);
        }
        quad_transpose(words);
        if (to)
          *reinterpret_cast<uint4*>(to + 32 * group + 8 * quad_lane) =
              make_uint4(words[0], words[1], words[2], words[3]);
      }
      if (to && quad_lane == 0) *lse_row(row) = lse[i];
    }
  }

  // A block has at most two parts: the end of an item that another block began, and the beginning of one that another
  // will end.
  __device__ int64_t slot(int cta) const { return 2 * cta + (cta == work_.first_cta); }

  template <class Output>
  __device__ void store_part(const Output& output, const float (&lse)[2]) const {
    int64_t first_row = slot(blockIdx.x) * Traits::kBlockM;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = row_ + 8 * i;
      if (row >= rows_) continue;
      float* to = params_.partial_out + (first_row + row) * Traits::kHeadDim + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int v = 0; v < Traits::kHeadDim / 8; ++v) {
        *reinterpret_cast<float2*>(to + 8 * v) = make_float2(output(4 * v + 2 * i), output(4 * v + 2 * i + 1));
      }
      if (threadIdx.x % 4 == 0) params_.partial_lse[first_row + row] = lse[i];
    }
  }

  // True in all consumer threads of the block whose part completes the item.
  __device__ bool arrived_last() const {
    __threadfence();
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, kConsumers);
    if (threadIdx.x == 128) {
      int* arrivals = Plan(params_.plan).arrivals + work_.first_cta;
      bool last = atomicAdd(arrivals, 1) == work_.parts - 1;
      if (last) *arrivals = 0;  // for the next launch under the same plan
      __threadfence();
      smem_.last_arrival = last;
    }
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, kConsumers);
    bool last = smem_.last_arrival;
    __threadfence();
    return last;
  }

  __device__ void combine() const {
    constexpr int kVectors = Traits::kHeadDim / 4;
    for (int i = threadIdx.x - 128; i < rows_ * kVectors; i += Traits::kConsumerThreads) {
      int row = i / kVectors, column = i % kVectors * 4;
      float max_lse = -INFINITY;
      for (int part = 0; part < work_.parts; ++part) max_lse = fmaxf(max_lse, __ldcg(part_lse(part, row)));
      float offset = max_lse == -INFINITY ? 0.f : max_lse;
      float sum = 0.f;
      float4 acc = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int part = 0; part < work_.parts; ++part) {
        float weight = expf(__ldcg(part_lse(part, row)) - offset);
        float4 x = __ldcg(reinterpret_cast<const float4*>(part_out(part, row) + column));
        sum += weight;
        acc.x += weight * x.x;
        acc.y += weight * x.y;
        acc.z += weight * x.z;
        acc.w += weight * x.w;
      }
      float inverse = sum == 0.f ? 1.f : 1.f / sum;
      cutlass::NumericArrayConverter<Element, float, 4> convert;
      auto result =
          convert(cutlass::Array<float, 4>{acc.x * inverse, acc.y * inverse, acc.z * inverse, acc.w * inverse});
      *reinterpret_cast<uint2*>(out_row(row) + column) = reinterpret_cast<const uint2&>(result);
      if (column == 0) *lse_row(row) = sum == 0.f ? -INFINITY : offset + logf(sum);
    }
  }

  __device__ const float* part_lse(int part, int row) const {
    return params_.partial_lse + slot(work_.first_cta + part) * Traits::kBlockM + row;
  }
  __device__ const float* part_out(int part, int row) const {
    return params_.partial_out + (slot(work_.first_cta + part) * Traits::kBlockM + row) * Traits::kHeadDim;
  }

  const FwdParams& params_;
  typename Traits::SharedStorage& smem_;
  const Work& work_;
  int row_, rows_;
  Element* out_;
  float* lse_;
};

}  // namespace lite_attention::sm90

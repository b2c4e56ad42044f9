// From registers to memory: the finished rows of a tile, or one part of a tile that several blocks share.
//
// The parts of a tile are added by the block that finishes last, always in the order of their keys, so the result does
// not depend on which block that is. A second launch for the sums would cost more than they do.
#pragma once

#include "sm90/rows.cuh"
#include "sm90/scheduler.cuh"
#include "sm90/softmax.cuh"
#include "sm90/traits.cuh"

namespace lite_attention::sm90 {

template <class Traits>
class Epilogue {
  using Element = typename Traits::Element;
  static constexpr int kPartRows = Traits::kCluster * Traits::kBlockM;
  static constexpr float kLog2E = 1.4426950408889634f;

 public:
  __device__ Epilogue(const FwdParams& params, typename Traits::SharedStorage& smem, const Work& work, const Rows& rows,
                      const ThreadRows& thread_rows)
      : params_(params),
        smem_(smem),
        work_(work),
        rows_(rows),
        thread_rows_(thread_rows),
        first_head_(work.head_tile * params.packing.pack),
        part_row_((first_warpgroup<Traits>() + threadIdx.x / 128 - 1) * kRowsPerWarpgroup) {
    int batch = params.lengths.cu_seqlens_q ? 0 : work.batch;
    int64_t token0 = int64_t{work.seq.q_begin} + rows.first_token;
    out_ = static_cast<Element*>(params.out) + batch * params.out_strides.batch + token0 * params.out_strides.token +
           first_head_ * params.out_strides.head;
    lse_ = params.lse + batch * params.lse_strides.batch + token0 * params.lse_strides.token +
           first_head_ * params.lse_strides.head;
  }

  // Rows that see no key: zeros, and the log-sum-exp of nothing or of the sink alone. A warp a row, in a loop that ends
  // for all lanes together (consumer.cuh says why).
  __device__ void store_nothing_seen() const {
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    for (int row = warp; row < rows_.used; row += 4) {
      const int token = row / params_.packing.pack, head = row - token * params_.packing.pack;
      if (lane * 8 < params_.head_dim) {
        *reinterpret_cast<uint4*>(out_row(token, head) + lane * 8) = make_uint4(0, 0, 0, 0);
      }
      float lse = -INFINITY;
      join_sink(lse, head);
      if (lane == 0) *lse_row(token, head) = lse;
    }
  }

  // A quad holds a row. Neighbours exchange words, so that each thread has 8 bytes of a sector of 32.
  template <class Output>
  __device__ void store_final(Output& output, const float (&lse)[2]) const {
    cutlass::NumericArrayConverter<Element, float, 2> convert;
    const int quad_lane = threadIdx.x % 4;
    const bool odd = quad_lane % 2;
    const int columns = params_.head_dim - 8 * odd - 4 * (quad_lane / 2);  // from this thread's first one on
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = thread_rows_.row(i), token = thread_rows_.token(i);
      const int head = thread_rows_.head(params_.packing, i);
      const int limit = row < rows_.used ? columns : 0;
      Element* to = out_row(token, head) + params_.head_dim - columns;
      float row_lse = lse[i];
      if (params_.sinks) {
        const float share = limit > 0 ? join_sink(row_lse, head) : 1.f;
#pragma unroll
        for (int v = 0; v < Traits::kHeadDim / 8; ++v) {
          output(4 * v + 2 * i) *= share;
          output(4 * v + 2 * i + 1) *= share;
        }
      }
#pragma unroll
      for (int group = 0; group < Traits::kHeadDim / 16; ++group) {
        uint32_t words[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int v = 2 * group + k;
          auto pair = convert(cutlass::Array<float, 2>{output(4 * v + 2 * i), output(4 * v + 2 * i + 1)});
          words[k] = reinterpret_cast<const uint32_t&>(pair);
        }
        const uint32_t received = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
        const uint2 four = odd ? make_uint2(received, words[1]) : make_uint2(words[0], received);
        if (16 * group < limit) *reinterpret_cast<uint2*>(to + 16 * group) = four;
      }
      if (limit > 0 && quad_lane == 0) *lse_row(token, head) = row_lse;
    }
  }

  template <class Output>
  __device__ void store(Output& output, const float (&lse)[2]) const {
    if (Traits::kSkip || work_.parts == 1) {  // items with lists have one part
      store_final(output, lse);
    } else {
      store_part(output, lse);
      if (arrived_last()) combine();
    }
  }

  // The share of a warpgroup without queries in an item of several parts: its threads are waited for.
  __device__ void store_no_part() const {
    if (arrived_last()) combine();
  }

 private:
  __device__ Element* out_row(int token, int head) const {
    return out_ + token * params_.out_strides.token + head * params_.out_strides.head;
  }
  __device__ float* lse_row(int token, int head) const {
    return lse_ + token * params_.lse_strides.token + head * params_.lse_strides.head;
  }

  // Adds the sink's logit to a row's log-sum-exp; gives what the row must be multiplied by.
  __device__ float join_sink(float& lse, int head) const {
    if (!params_.sinks) return 1.f;
    float sink = params_.sinks[first_head_ + head], high = fmaxf(lse, sink);
    if (high == -INFINITY) return 1.f;
    float all = high + logf(expf(lse - high) + expf(sink - high)), share = expf(lse - all);
    lse = all;
    return share;
  }

  // A worker has at most two parts: the end of an item that another one began, and the beginning of one that another
  // will end.
  __device__ int64_t slot(int part) const { return 2 * (work_.first_run + part) + (part == 0); }

  template <class Output>
  __device__ void store_part(const Output& output, const float (&lse)[2]) const {
    int64_t first_row = slot(work_.part) * kPartRows + part_row_;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = thread_rows_.row(i);
      if (row >= rows_.used) continue;
      float* to = params_.partial_out + (first_row + row) * Traits::kHeadDim + 2 * (threadIdx.x % 4);
#pragma unroll
      for (int v = 0; v < Traits::kHeadDim / 8; ++v) {
        *reinterpret_cast<float2*>(to + 8 * v) = make_float2(output(4 * v + 2 * i), output(4 * v + 2 * i + 1));
      }
      if (threadIdx.x % 4 == 0) params_.partial_lse[first_row + row] = lse[i];
    }
  }

  // True in all consumer threads of the block whose part completes the item. The barriers order what the threads of a
  // block write and read, and one thread's atomic, which releases and acquires, orders that among blocks.
  __device__ bool arrived_last() const {
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, kConsumers);
    if (threadIdx.x == 128) {
      int* arrivals =
          Plan(params_.plan).arrivals + work_.first_run * Traits::kCluster + Cluster<Traits::kCluster>::rank();
      int before;
      asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
      bool last = before == work_.parts - 1;
      if (last) *arrivals = 0;  // for the next launch under the same plan
      smem_.last_arrival = last;
    }
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, kConsumers);
    return __shfl_sync(~0u, int(smem_.last_arrival), 0);
  }

  // Every warpgroup adds up its own rows. A warp has eight loads under way, of one row, or of several where those have
  // few parts; a lane has four columns of every 128, and the weight of one part. Little code counts as much: it runs
  // once, and none of it is in the instruction cache then. And few registers: what they leave no room for is in memory
  // during all of the kernel, its steps included.
  __device__ void combine() const {
    constexpr int kVectors = (Traits::kHeadDim + 127) / 128;
    constexpr int kAtOnce = 8 / kVectors, kLogSums = kVectors == 1 ? 2 : 1, kSums = 1 << kLogSums;
    // The same for all lanes, as ptxas must see: loops that end for each lane on its own make ring stages and
    // descriptors of the whole kernel leave uniform registers.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    const int log_rows = work_.parts <= 2 ? kLogSums : work_.parts <= 4 ? kLogSums - 1 : 0;
    const int parts_at_once = kAtOnce >> log_rows, lanes = 32 >> log_rows;  // of a row
    const int rows_apart = 4;                                               // of a warp
#pragma unroll 1
    for (int row0 = warp; row0 < rows_.used; row0 += rows_apart << log_rows) {
      const int my_row = row0 + lane / lanes * rows_apart;
      float high = -INFINITY, sum = 0.f, weight = 0.f;
      float4 acc[kSums][kVectors] = {};
#pragma unroll 1
      for (int first = 0; first < work_.parts; first += parts_at_once) {
        float4 x[kAtOnce][kVectors];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = row0 + (i << log_rows) / kAtOnce * rows_apart, part = first + (i & (parts_at_once - 1));
          const bool there = part < work_.parts && row < rows_.used;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int column = v * 128 + lane * 4;
            const float* from = part_out(part, row) + column;
            x[i][v] = there && column < Traits::kHeadDim ? __ldcg(reinterpret_cast<const float4*>(from)) : float4{};
          }
        }
        if ((first & (lanes - 1)) == 0) {
          const int part = first + (lane & (lanes - 1));
          const float lse = part < work_.parts && my_row < rows_.used ? __ldcg(part_lse(part, my_row)) : -INFINITY;
          float now = fmaxf(high, lse);
#pragma unroll 1
          for (int step = lanes / 2; step > 0; step /= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, step));
          const float offset = now == -INFINITY ? 0.f : now * kLog2E;
          const float rescale = exp2_approx(high * kLog2E - offset);
          high = now;
          weight = exp2_approx(lse * kLog2E - offset);
          float weights = weight;
#pragma unroll 1
          for (int step = lanes / 2; step > 0; step /= 2) weights += __shfl_xor_sync(~0u, weights, step);
          sum = sum * rescale + weights;
          // Changes something where there are more parts than lanes: of one row then, whose rescale this is.
#pragma unroll
          for (auto& vectors : acc) {
#pragma unroll
            for (float4& a : vectors) a = {a.x * rescale, a.y * rescale, a.z * rescale, a.w * rescale};
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int part = first + (i & (parts_at_once - 1));
          const float each = __shfl_sync(~0u, weight, (i << log_rows) / kAtOnce * lanes + (part & (lanes - 1)));
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            float4& a = acc[i * kSums / kAtOnce][v];
            a = {a.x + each * x[i][v].x, a.y + each * x[i][v].y, a.z + each * x[i][v].z, a.w + each * x[i][v].w};
          }
        }
      }
      const float my_lse = sum == 0.f ? -INFINITY : high + logf(sum), my_share = sum == 0.f ? 1.f : 1.f / sum;
#pragma unroll
      for (int apart = 1; apart < kSums; apart *= 2) {
        if (apart << log_rows >= kSums) break;
#pragma unroll
        for (int k = 0; k < kSums; k += 2 * apart) add(acc[k], acc[k + apart]);
      }
#pragma unroll 1
      for (int i = 0; i < 1 << log_rows; ++i) {
        const int row = row0 + i * rows_apart, token = row / params_.packing.pack;
        const int head = row - token * params_.packing.pack;
        if (row >= rows_.used) break;
        float lse = __shfl_sync(~0u, my_lse, i * lanes);
        const float factor = __shfl_sync(~0u, my_share, i * lanes) * join_sink(lse, head);
        cutlass::NumericArrayConverter<Element, float, 4> convert;
        const int of_row = i << (kLogSums - log_rows);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          float4 a = acc[0][v];
#pragma unroll
          for (int k = 1; k < kSums; ++k) {
            if (of_row == k) a = acc[k][v];
          }
          const int column = v * 128 + lane * 4;
          if (column >= params_.head_dim) continue;
          auto result = convert(cutlass::Array<float, 4>{a.x * factor, a.y * factor, a.z * factor, a.w * factor});
          *reinterpret_cast<uint2*>(out_row(token, head) + column) = reinterpret_cast<const uint2&>(result);
        }
        if (lane == 0) *lse_row(token, head) = lse;
      }
    }
  }

  template <int kVectors>
  __device__ static void add(float4 (&to)[kVectors], const float4 (&x)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      to[v] = {to[v].x + x[v].x, to[v].y + x[v].y, to[v].z + x[v].z, to[v].w + x[v].w};
    }
  }

  __device__ int64_t part_at(int part, int row) const { return slot(part) * kPartRows + part_row_ + row; }
  __device__ const float* part_lse(int part, int row) const { return params_.partial_lse + part_at(part, row); }
  __device__ const float* part_out(int part, int row) const {
    return params_.partial_out + part_at(part, row) * Traits::kHeadDim;
  }

  const FwdParams& params_;
  typename Traits::SharedStorage& smem_;
  const Work& work_;
  const Rows& rows_;
  const ThreadRows& thread_rows_;
  int first_head_;
  int part_row_;  // where this warpgroup's rows begin in a part
  Element* out_;
  float* lse_;
};

}  // namespace lite_attention::sm90

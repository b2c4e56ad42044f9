"""patch.py TREE: clocks of every item's border into the kernels of TREE, of which only kSkip and kFull of hd 128 remain.

g_trace[block][who][item][point], who 0 producers, 1 and 2 consumer warpgroups: la_trace() reads it, trace.py prints it.
"""
import re
import sys
from pathlib import Path

tree = Path(sys.argv[1]) / "csrc/sm90"


def patch(name, *pairs):
    path = tree / name
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, (name, text.count(old), old)
        text = text.replace(old, new)
    path.write_text(text)


def after(text, *more):  # a line, and what comes after it
    return text, text + "\n" + "\n".join(more)


W = "warpgroup_ + 1, trace_item_"
patch(
    "plan.cuh",
    (
        "namespace lite_attention::sm90 {\n",
        """#define TRACE_ITEMS 96
#define TRACE_POINTS 32
namespace lite_attention::sm90 {
__device__ unsigned g_trace[132 * 3 * TRACE_ITEMS * TRACE_POINTS];
__device__ inline void trace_put(int who, int item, int point, unsigned value) {
  if (item >= 0 && item < TRACE_ITEMS) g_trace[((blockIdx.x * 3 + who) * TRACE_ITEMS + item) * TRACE_POINTS + point] = value;
}
__device__ inline void trace(int who, int item, int point) {
  if (threadIdx.x % 128 == 0) trace_put(who, item, point, unsigned(clock64()));
}
__device__ inline void trace_warp(int item, int point) {
  if (threadIdx.x % 32 == 0) trace_put(0, item, point, unsigned(clock64()));
}
""",
    ),
)
patch(
    "consumer.cuh",
    (
        "      smem_.q_full[warpgroup_].wait(q_phase_);\n      q_phase_ ^= 1;\n"
        "      smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n      turn_.wait();\n      issue_qk();\n"
        "      if constexpr (kJoined) {",
        f"      trace({W}, 3);\n      smem_.q_full[warpgroup_].wait(q_phase_);\n      trace({W}, 4);\n      q_phase_ ^= 1;\n"
        f"      smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n      trace({W}, 5);\n      turn_.wait();\n      trace({W}, 6);\n"
        "      issue_qk();\n      if constexpr (kJoined) {",
    ),
    ("      softmax = Softmax(Score", f"      trace({W}, 7);\n      softmax = Softmax(Score"),
    after("      gemm_wait<kJoined ? 1 : 0>(scores);", f"      trace({W}, 8);"),
    (
        "      weigh(item);\n      if constexpr (kJoined) {\n        warpgroup_fence_operand(scores);\n        gemm_wait<0>(output);\n",
        f"      weigh(item);\n      trace({W}, 9);\n      if constexpr (kJoined) {{\n        warpgroup_fence_operand(scores);\n"
        f"        gemm_wait<0>(output);\n        trace({W}, 10);\n",
    ),
    (
        "        store(false_type{});\n      }\n",
        f"        store(false_type{{}});\n      }}\n      trace({W}, 11);\n",
    ),
    (
        "      return Item<Traits>(params_, ring_work_.get(), thread_rows_, lists_, warpgroup_);",
        f"      ++trace_item_;\n      trace({W}, 0);\n      const Work got = ring_work_.get();\n      trace({W}, 1);\n"
        "      return Item<Traits>(params_, got, thread_rows_, lists_, warpgroup_);",
    ),
    (
        "      const int n_begin = item.work.n_begin;\n",
        f"      trace({W}, 12);\n      const int n_begin = item.work.n_begin;\n      int trace_n = 0;\n",
    ),
    (
        "item.mask.clean_begin); item.go_on()) step(item, false_type{});",
        "item.mask.clean_begin); item.go_on()) {\n        step(item, false_type{});\n"
        f"        if (++trace_n < 10) trace({W}, 15 + trace_n);\n      }}",
    ),
    (
        "      lists_.leave();\n\n      if (int begin",
        f"      trace({W}, 13);\n      if (threadIdx.x % 128 == 0) trace_put({W}, 14, trace_n);\n      lists_.leave();\n\n      if (int begin",
    ),
    ("  uint32_t q_phase_ = 0;\n", "  uint32_t q_phase_ = 0;\n  int trace_item_ = -1;\n"),
)
patch(
    "producer.cuh",
    ("constexpr int kAskAt = Traits::kSkip ? 3 : 2;", "constexpr int kAskAt = Traits::kSkip ? TRACE_ASK : 2;"),
    after("    keeper_.make_room();", "    trace_warp(int(items_), 4);"),
    (
        "    Work work = scheduler_.next();\n    keeper_.open(work);\n    ring_work.put(work);\n",
        "    trace_warp(int(items_) - 1, 0);\n    Work work = scheduler_.next();\n    trace_warp(int(items_) - 1, 1);\n"
        "    keeper_.open(work);\n    trace_warp(int(items_) - 1, 2);\n    ring_work.put(work);\n"
        "    trace_warp(int(items_) - 1, 3);\n",
    ),
    ("  bool planned = false;\n", "  bool planned = false;\n  int trace_item = -1;\n"),
    (
        "    if (job.loads_q) queries.load(params, smem, work);\n",
        "    ++trace_item;\n    const int mark = 8 + 4 * (threadIdx.x / 32);\n    trace_warp(trace_item, mark);\n"
        "    if (job.loads_q) queries.load(params, smem, work);\n    if (job.loads_q) trace_warp(trace_item, mark + 1);\n",
    ),
    ("    lists.leave();\n  }\n", "    if (job.loads_k || job.loads_v) trace_warp(trace_item, mark + 2);\n    lists.leave();\n  }\n"),
)
text = (tree / "fwd.cuh").read_text()
kinds = "std::integral_constant<TileKind, TileKind::k%s>{}"
for kind in ("Decode", "Paged", "Prefill"):
    text = text.replace("return select(" + kinds % kind + ");", "return {};")
text = text.replace(
    "return score_mod ? make_kernel<Element, kHeadDim, kKind, true>() : make_kernel<Element, kHeadDim, kKind, false>();",
    "return make_kernel<Element, kHeadDim, kKind, false>();",
)
(tree / "fwd.cuh").write_text(text)
instance = tree / "instances/hd128_bf16.cu"
instance.write_text(
    instance.read_text()
    + """
extern "C" __attribute__((visibility("default"))) int la_trace(void* to, int clear) {
  using lite_attention::sm90::g_trace;
  if (!clear) return cudaMemcpyFromSymbol(to, g_trace, sizeof(g_trace));
  void* p;
  cudaGetSymbolAddress(&p, g_trace);
  return cudaMemset(p, 0, sizeof(g_trace));
}
"""
)

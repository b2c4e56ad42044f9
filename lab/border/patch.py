"""patch.py TREE: clocks of the ends of items, and nothing else; kSkip, kFull and kPrefill of hd 128 remain."""
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


patch(
    "plan.cuh",
    (
        "namespace lite_attention::sm90 {\n",
        """namespace lite_attention::sm90 {
__device__ unsigned g_trace[132 * 2 * 96 * 2];
__device__ inline void trace(int who, int item, int tiles) {
  if (threadIdx.x % 128 == 0 && item < 96) {
    unsigned* to = g_trace + ((blockIdx.x * 2 + who) * 96 + item) * 2;
    to[0] = unsigned(clock64());
    to[1] = tiles;
  }
}
""",
    ),
)
text = (tree / "consumer.cuh").read_text()
for old in ("      lists_.leave();\n\n      if (int begin", "      lists_.leave();\n      if (int begin"):
    if text.count(old) == 1:
        text = text.replace(old, "      if (warpgroup_ < 2) trace(warpgroup_, trace_item_++, item.walk.tiles(item.work));\n" + old)
text = text.replace("  uint32_t q_phase_ = 0;\n", "  uint32_t q_phase_ = 0;\n  int trace_item_ = 0;\n")
assert text.count("trace_item_") == 2
(tree / "consumer.cuh").write_text(text)
text = (tree / "fwd.cuh").read_text()
kinds = "std::integral_constant<TileKind, TileKind::k%s>{}"
for kind in ("Decode", "Paged"):
    text = text.replace("return select(" + kinds % kind + ");", "return {};")
text = text.replace(
    "return score_mod ? make_kernel<Element, kHeadDim, kKind, true>() : make_kernel<Element, kHeadDim, kKind, false>();",
    "return make_kernel<Element, kHeadDim, kKind, false>();",
)
(tree / "fwd.cuh").write_text(text)
for hd in (64, 128, 256):
    instance = tree / f"instances/hd{hd}_bf16.cu"
    instance.write_text(
        instance.read_text()
        + """
extern "C" __attribute__((visibility("default"))) int la_trace_%d(void* to, int clear) {
  using lite_attention::sm90::g_trace;
  if (!clear) return cudaMemcpyFromSymbol(to, g_trace, sizeof(g_trace));
  void* p;
  cudaGetSymbolAddress(&p, g_trace);
  return cudaMemset(p, 0, sizeof(g_trace));
}
""" % hd
    )

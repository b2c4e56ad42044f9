"""variant.py TREE NAME: makes a tree of branch `softmax` into a variant of it, with dense bf16 kernels and lists alone.

sN: one of N groups of four by polynomial (s0 none). wN: likewise, and exponentials after PV is waited for, under which
probabilities are rounded. xN: likewise as sN, with sums by single values as on `abreast`. base: as it is (abreast).
"""
import sys
from pathlib import Path

tree, name = Path(sys.argv[1]) / "csrc/sm90", sys.argv[2]


def patch(file, *pairs):
    path = tree / file
    text = path.read_text()
    for old, new in pairs:
        assert text.count(old) == 1, (file, text.count(old), old)
        text = text.replace(old, new)
    path.write_text(text)


kinds = "    case TileKind::k%s:\n      return select(std::integral_constant<TileKind, TileKind::k%s>{});"
for kind in ("Decode", "Paged"):
    patch("fwd.cuh", (kinds % (kind, kind), "    case TileKind::k%s:\n      return {};" % kind))
patch(
    "fwd.cuh",
    (
        "return score_mod ? make_kernel<Element, kHeadDim, kKind, true>() : make_kernel<Element, kHeadDim, kKind, false>();",
        "return make_kernel<Element, kHeadDim, kKind, false>();",
    ),
)
if name != "base":
    patch("traits.cuh", ("kPolynomialOf = kScoreMod ? 0 : 4;", f"kPolynomialOf = kScoreMod ? 0 : {int(name[1:])};"))
if name[0] == "x":
    patch(
        "softmax.cuh",
        (
            "    for (int k = 0; k < kSize; k += 2) row_sum[k / 2 % 2] += scores(k) + scores(k + 1);\n",
            "    for (int k = 0; k < kSize; ++k) row_sum[k / 2 % 2] += scores(k);\n",
        ),
    )
if name[0] == "w":
    wait = """      if (!item.last_tile()) {
        smem_.k_full[ring_k_.stage].wait(ring_k_.phase ^ uint32_t(softmax.sums_are_negative()));
      }
"""
    patch(
        "consumer.cuh",
        ("      softmax.exponentiate(scores);\n" + wait, "      if (!item.last_tile()) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n"),
        ("      weigh(item);\n      if constexpr (kJoined) {", "      weigh(item);\n      softmax.exponentiate(scores);\n      if constexpr (kJoined) {"),
        (
            "      warpgroup_fence_operand(scores);\n      gemm_wait<0>(output);\n      release_v();\n      if (moved) scale_output(rescale);\n",
            "      gemm_wait<0>(output);\n      release_v();\n      if (moved) scale_output(rescale);\n      softmax.exponentiate(scores);\n",
        ),
    )

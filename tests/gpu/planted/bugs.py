"""Bugs to plant in the kernel: one place in csrc/ each, and what stands there instead."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Bug(NamedTuple):
    name: str
    file: str  # below csrc/
    old: str  # stands there once
    new: str


BUGS = [
    # The mask: one key too many or too few, in a tile on the diagonal, in the choice of such tiles, at a window's edge.
    Bug("mask-end-late", "sm90/mask.cuh", "end_key = end_seen(lengths, diagonal, seqlen_k);",
        "end_key = end_seen(lengths, diagonal, seqlen_k) + 1;"),
    Bug("mask-end-early", "sm90/mask.cuh", "end_key = end_seen(lengths, diagonal, seqlen_k);",
        "end_key = end_seen(lengths, diagonal, seqlen_k) - 1;"),
    Bug("mask-tile-taken-for-clean", "sm90/mask.cuh", "clean_end = seq.end_key(lengths, rows.first_token) / block_n;",
        "clean_end = seq.end_key(lengths, rows.first_token) / block_n + 1;"),
    Bug("mask-window-late", "sm90/mask.cuh", "first_key = first_seen(lengths, diagonal),",
        "first_key = first_seen(lengths, diagonal) + 1,"),
    Bug("unused-rows-of-v-left", "sm90/consumer.cuh",
        "if (int end = item.mask.seqlen_k - item.n * kBlockN; end < kBlockN && !zeros_follow()) {",
        "if (false) {\n        int end = 0;"),
    # Waits: a consumer that does not wait for what it reads, a producer that does not wait for what it overwrites.
    Bug("no-wait-for-q", "sm90/consumer.cuh", "      smem_.q_full[warpgroup_].wait(q_phase_);\n", ""),
    Bug("no-wait-for-first-k", "sm90/consumer.cuh",
        "      smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n      turn_.wait();", "      turn_.wait();"),
    Bug("no-wait-for-next-k", "sm90/consumer.cuh",
        "      if (!item.last_tile()) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n", ""),
    Bug("no-wait-for-v", "sm90/consumer.cuh",
        "      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);\n      gemm_async", "      gemm_async"),
    Bug("no-wait-for-free-stage", "sm90/producer.cuh", "    loads.empty[ring.stage].wait(ring.phase ^ 1);\n", ""),
    Bug("no-wait-for-free-q", "sm90/producer.cuh",
        "      smem.q_empty[warpgroup].wait((phases_ >> warpgroup & 1) ^ 1);\n", ""),
    Bug("v-released-before-pv", "sm90/consumer.cuh", "      gemm_wait<0>(output);\n      release_v();\n",
        "      release_v();\n      gemm_wait<0>(output);\n"),
    Bug("parts-not-counted-anew", "sm90/epilogue.cuh",
        "      if (last) *arrivals = 0;  // for the next launch under the same plan\n", ""),
    # Arithmetic between tiles, and between items.
    Bug("output-not-rescaled", "sm90/consumer.cuh", "      if (moved) scale_output(rescale);\n", ""),
    Bug("item-before-left-unfinished", "sm90/consumer.cuh", "        finish_rows();  // while QK runs", "        // while QK runs"),
    Bug("parts-joined-to-the-next-item", "sm90/consumer.cuh", "      whole = Traits::kSkip || item.work.parts == 1;\n",
        "      whole = true;\n"),
]  # fmt: skip


def plant(bug: Bug, csrc: Path) -> None:
    """Changes the copy of csrc/ at `csrc`.

    Raises:
        ValueError: `bug.old` does not stand there once: the source has moved on, and the bug must follow.
    """
    path = csrc / bug.file
    text = path.read_text()
    if (count := text.count(bug.old)) != 1:
        raise ValueError(f"{bug.name}: its text stands {count} times in csrc/{bug.file}; needs to stand there once")
    path.write_text(text.replace(bug.old, bug.new))

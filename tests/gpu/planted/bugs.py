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
    Bug("mask-end-late", "sm90/mask.cuh", "end_key[i] = seq.end_key(lengths, token);",
        "end_key[i] = seq.end_key(lengths, token) + 1;"),
    Bug("mask-end-early", "sm90/mask.cuh", "end_key[i] = seq.end_key(lengths, token);",
        "end_key[i] = seq.end_key(lengths, token) - 1;"),
    Bug("mask-tile-taken-for-clean", "sm90/mask.cuh", "clean_end = seq.end_key(lengths, rows.first_token) / block_n;",
        "clean_end = seq.end_key(lengths, rows.first_token) / block_n + 1;"),
    Bug("mask-window-late", "sm90/mask.cuh", "first_key[i] = seq.first_key(lengths, token);",
        "first_key[i] = seq.first_key(lengths, token) + 1;"),
    Bug("unused-rows-of-v-left", "sm90/consumer.cuh",
        "if (int end = mask.seqlen_k - n * Traits::kBlockN; end < Traits::kBlockN) {",
        "if (false) {\n      int end = 0;"),
    # Waits: a consumer that does not wait for what it reads, a producer that does not wait for what it overwrites.
    Bug("no-wait-for-q", "sm90/consumer.cuh", "    smem_.q_full[warpgroup_].wait(q_phase_);\n", ""),
    Bug("no-wait-for-first-k", "sm90/consumer.cuh",
        "    smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n    gemm_async", "    gemm_async"),
    Bug("no-wait-for-next-k", "sm90/consumer.cuh",
        "      if (n > work.n_begin) smem_.k_full[ring_k_.stage].wait(ring_k_.phase);\n      gemm_wait<0>(output);",
        "      gemm_wait<0>(output);"),
    Bug("no-wait-for-v", "sm90/consumer.cuh",
        "      smem_.v_full[ring_v_.stage].wait(ring_v_.phase);\n      gemm_async", "      gemm_async"),
    Bug("no-wait-for-last-v", "sm90/consumer.cuh",
        "    smem_.v_full[ring_v_.stage].wait(ring_v_.phase);\n    if (int begin = mask.first_valid",
        "    if (int begin = mask.first_valid"),
    Bug("no-wait-for-free-stage", "sm90/producer.cuh", "    empty[ring.stage].wait(ring.phase ^ 1);\n", ""),
    Bug("no-wait-for-free-q", "sm90/producer.cuh",
        "      smem.q_empty[warpgroup].wait((phases_ >> warpgroup & 1) ^ 1);\n", ""),
    Bug("v-released-before-pv", "sm90/consumer.cuh", "      gemm_wait<0>(output);\n      release_v();\n",
        "      release_v();\n      gemm_wait<0>(output);\n"),
    Bug("parts-not-counted-anew", "sm90/epilogue.cuh",
        "      if (last) *arrivals = 0;  // for the next launch under the same plan\n", ""),
    # Arithmetic between tiles.
    Bug("output-not-rescaled", "sm90/consumer.cuh", "      if (moved) {\n", "      if (false) {\n"),
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

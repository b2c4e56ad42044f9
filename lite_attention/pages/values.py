"""Checks of what only the memory tells, made inside of the ops of the CPU path and the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.pages.layout import ALIGNMENT, PAGE
from lite_attention.pages.problem import Selection
from lite_attention.problem import Problem
from lite_attention.values import check_lengths, check_pages, lengths_of


def check_start(sketch: Tensor) -> None:
    """Raises ValueError where vector loads don't reach the sketches; their strides were checked before."""
    start = sketch.storage_offset()
    if start % ALIGNMENT:
        raise wrong("sketch", f"a view from byte {start} on", f"one that starts at a multiple of {ALIGNMENT} bytes")


def check_page_numbers(name: str, pages: Tensor, num_blocks: int) -> None:
    """Raises ValueError where `pages`, an argument of that name, has a page that the cache hasn't."""
    highest = max(pages.tolist(), default=0)
    if highest >= num_blocks:
        raise wrong(name, highest, f"at most {num_blocks - 1}, or negative numbers for none")


def check_selection(selection: Selection) -> None:
    """Raises ValueError for lengths or pages that don't fit."""
    s = selection
    check_start(s.sketch)
    longest = max(lengths_of("cu_seqlens_q", s.cu_seqlens_q, s.q.shape[0]), default=0)
    if longest > s.max_seqlen_q:
        raise wrong("max_seqlen_q", s.max_seqlen_q, f"at least the longest sequence of cu_seqlens_q, {longest}")
    lengths, blocks = s.seqused_k.tolist(), s.block_table.shape[1]
    check_lengths("seqused_k", lengths, [blocks * PAGE] * len(lengths), PAGE)
    check_pages(s.block_table, lengths, PAGE, s.sketch.shape[0])


def check_lists(problem: Problem, indices: Tensor, counts: Tensor) -> None:
    """Raises ValueError for lists that are not of pages of the sequences, each once and ascending, or lack new ones."""
    held = (problem.seqused_k + PAGE - 1) // PAGE
    wrong_count = (counts < 0) | (counts > held[:, None])
    if wrong_count.any():
        b, head = wrong_count.nonzero()[0].tolist()
        given = f"{int(counts[b, head])} pages for sequence {b}, head {head}"
        raise wrong("lists", given, f"at most the {int(held[b])} pages that the sequence has")
    entry = torch.arange(indices.shape[2], device=counts.device)
    listed = entry < counts[..., None]
    indices = indices.where(listed, 0)
    bad = listed & ((indices < 0) | (indices >= held[:, None, None]))
    bad[..., 1:] |= listed[..., 1:] & (indices[..., 1:] <= indices[..., :-1])
    if bad.any():
        b, head, n = bad.nonzero()[0].tolist()
        given = f"page {int(indices[b, head, n])} as entry {n} of sequence {b}, head {head}"
        raise wrong("lists", given, f"ascending pages below {int(held[b])}, as select_pages writes for these lengths")
    # Kernels give the listed keys new positions, one after the other: the last ones keep their distance from the end.
    q_lens = problem.cu_seqlens_q.diff()
    first = (problem.seqused_k - q_lens).clamp(min=0) // PAGE
    new = (listed & (indices >= first[:, None, None])).sum(-1)
    lacking = (q_lens > 1)[:, None] & (new < (held - first)[:, None])
    if lacking.any():
        b, head = lacking.nonzero()[0].tolist()
        given = f"{int(new[b, head])} pages from page {int(first[b])} on for sequence {b}, head {head}"
        works = f"all {int(held[b] - first[b])}, as the sequence has {int(q_lens[b])} query tokens there"
        raise wrong("lists", given, works)

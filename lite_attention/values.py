"""Checks of what only the memory tells: lengths and page numbers.

They read values back to the host, so the Hopper path never makes them. The CPU path and the reference make them before
they compute anything, inside of their ops, so that a compiled caller gets the same errors.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.problem import Problem


def readable(x: Tensor) -> bool:
    """Whether reading x costs nothing: a real CPU tensor, outside of tracing."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and x.device.type == "cpu"


def check_values(problem: Problem, lengths_name: str = "seqused_k") -> None:
    """Raises ValueError for lengths or pages that don't fit. `lengths_name` is what the caller calls seqused_k."""
    p = problem
    if p.cu_seqlens_q is not None:
        longest = max(lengths_of("cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0]), default=0)
        if longest > p.max_seqlen_q:
            raise wrong("max_seqlen_q", p.max_seqlen_q, f"at least the longest sequence of cu_seqlens_q, {longest}")

    capacity = [p.max_seqlen_k] * p.batch
    if p.paged:
        capacity = [p.block_table.shape[1] * p.page_size] * p.batch
    elif not p.packed:
        capacity = [p.k.shape[1]] * p.batch
    lengths, name = capacity, "cu_seqlens_k"
    if p.cu_seqlens_k is not None:
        lengths = lengths_of("cu_seqlens_k", p.cu_seqlens_k, p.k.shape[0] if p.packed else None)
        capacity = lengths if p.packed else capacity
    if p.seqused_k is not None:
        lengths, name = p.seqused_k.tolist(), lengths_name
    check_lengths(name, lengths, capacity, p.page_size)
    longest = max(lengths, default=0)
    if longest > p.max_seqlen_k:
        raise wrong("max_seqlen_k", p.max_seqlen_k, f"at least the longest sequence of {name}, {longest}")
    if p.paged:
        check_pages(p.block_table, lengths, p.page_size, p.k.shape[0])


def check_lengths(name: str, lengths: list[int], capacity: list[int], page_size: int | None) -> None:
    """Raises ValueError for a length, of what the caller calls `name`, that its keys or its pages have no room for."""
    for b, (length, room) in enumerate(zip(lengths, capacity, strict=True)):
        if length < 0:
            raise wrong(name, f"{length} for sequence {b}", "lengths of 0 or more")
        if length > room and page_size is not None:
            raise wrong(
                "block_table",
                f"{room // page_size} pages of {page_size} keys",
                f"room for the {length} keys of sequence {b} ({name})",
            )
        if length > room:
            raise wrong(name, f"{length} for sequence {b}", f"at most the {room} keys that it has")


def lengths_of(name: str, starts: Tensor, rows: int | None) -> list[int]:
    """The differences of `starts`, which rise from 0 and end at `rows` or before."""
    values = starts.tolist()
    lengths = [end - start for start, end in pairwise(values)]
    if values[0] < 0 or min(lengths, default=0) < 0:
        raise wrong(name, values, "starts that rise from 0")
    if rows is not None and values[-1] > rows:
        raise wrong(name, f"an end at {values[-1]}", f"at most the {rows} rows that there are")
    return lengths


def check_pages(block_table: Tensor, lengths: list[int], page_size: int, num_blocks: int) -> None:
    """Raises ValueError where an entry that a sequence of `lengths` uses is no page of the cache."""
    pages = torch.tensor([-(-length // page_size) for length in lengths], device=block_table.device)
    used = torch.arange(block_table.shape[1], device=block_table.device) < pages[:, None]
    bad = ((block_table < 0) | (block_table >= num_blocks)) & used
    if bad.any():
        b, page = bad.nonzero()[0].tolist()
        raise wrong(
            "block_table", f"{int(block_table[b, page])} for page {page} of sequence {b}", f"0 to {num_blocks - 1}"
        )

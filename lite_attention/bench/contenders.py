"""What is timed: LiteAttention, and the interface that its peers share with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

import lite_attention
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.targets import OURS, OWN_CONTIGUOUS

Call = Callable[[], Tensor]
"""Computes prepared inputs and returns out: the rows of q in their order, whatever the leading dimensions."""


class Contender(Protocol):
    """An implementation of attention."""

    name: str

    def available(self) -> str | None:
        """Why it can't be used on this machine; None where it can."""

    def identity(self) -> str:
        """Which one it is: a version or a file. Asked only where it is available."""

    def lacks(self, shape: Shape) -> str | None:
        """What it lacks for this shape, in a few words; None where it should compute it."""

    def prepare(self, inputs: Inputs) -> Call:
        """A call that computes `inputs`; all that a server would do once a step is done here."""


@runtime_checkable
class WithLists(Protocol):
    """A contender that can leave tiles out as well, by lists that are made beforehand."""

    lists_name: str
    """Its name where it does."""
    lists_tile: tuple[int, int]
    """Queries and keys of a tile."""

    def lacks_lists(self, shape: Shape) -> str | None:
        """As `lacks`."""

    def prepare_lists(self, inputs: Inputs, visits: Tensor) -> Call:
        """As `prepare`. `visits` is bool (batch, heads, q_tiles, kv_tiles)."""


class Ours:
    """LiteAttention, by its public functions. `prepare` fills out with NaN, which a call must overwrite."""

    name = OURS

    def available(self) -> str | None:
        return None

    def identity(self) -> str:
        return lite_attention.__version__

    def lacks(self, shape: Shape) -> str | None:
        return None  # what isn't built raises NotImplementedError, and is told so

    def prepare(self, inputs: Inputs) -> Call:
        shape, out = inputs.shape, torch.full_like(inputs.q, math.nan, dtype=torch.bfloat16)
        if shape.layout == "dense":
            return lambda: lite_attention.flash_attn_func(
                inputs.q, inputs.k, inputs.v, causal=shape.causal, out=out, **inputs.descales
            )
        paged = inputs.block_table is not None
        longest = max(shape.q_lens), max(shape.k_lens)
        metadata = plan_of(inputs)
        return lambda: lite_attention.flash_attn_varlen_func(
            inputs.q,
            inputs.k,
            inputs.v,
            inputs.cu_seqlens_q,
            None if paged else inputs.cu_seqlens_k,
            *longest,
            causal=shape.causal,
            seqused_k=inputs.seqused_k if paged else None,
            block_table=inputs.block_table,
            scheduler_metadata=metadata,
            out=out,
            **inputs.descales,
        )


def plan_of(inputs: Inputs, min_context: int = 0) -> Tensor | None:
    """The scheduler metadata of packed or paged inputs, where it is to be there before the call.

    `min_context` is that of `decode_pages`.
    """
    shape = inputs.shape
    if not shape.planned or not inputs.q.is_cuda:  # the CPU path plans nothing
        return None
    return lite_attention.get_scheduler_metadata(
        shape.batch,
        max(shape.q_lens),
        max(shape.k_lens),
        shape.heads,
        shape.heads_k,
        shape.head_dim,
        cu_seqlens_q=inputs.cu_seqlens_q,
        total_q=inputs.q.shape[0],
        seqused_k=inputs.seqused_k,
        causal=shape.causal,
        page_size=shape.page_size,
        kv_dtype=inputs.k.dtype,
        q_dtype=inputs.q.dtype,
        min_context=min_context,
    )


class OwnContiguous(Ours):
    """LiteAttention on keys copied out of their pages beforehand: what paging costs."""

    name = OWN_CONTIGUOUS

    def lacks(self, shape: Shape) -> str | None:
        return None if shape.layout == "paged" else "no pages"

    def prepare(self, inputs: Inputs) -> Call:
        shape, out = inputs.shape, torch.full_like(inputs.q, math.nan)
        keys = [inputs.keys_of(b) for b in range(shape.batch)]
        k, v = (torch.cat(parts) for parts in zip(*keys, strict=True))
        return lambda: lite_attention.flash_attn_varlen_func(
            inputs.q,
            k,
            v,
            inputs.cu_seqlens_q,
            inputs.cu_seqlens_k,
            max(shape.q_lens),
            max(shape.k_lens),
            causal=shape.causal,
            out=out,
        )

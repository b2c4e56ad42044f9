"""Turns the arguments of the public functions into one checked, normalised `Problem`, or raises before anything runs.

Shapes, dtypes, devices and strides are read from metadata alone, so that nothing waits for a GPU and everything traces under
`torch.compile` and FakeTensors. What only the values tell (lengths, page numbers) is checked where reading them is free: on real CPU
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Sequence(NamedTuple):
    """Where one sequence of a batch lies: rows [q_start, q_start + q_len) of q, keys [k_start, k_start + k_len) of k."""

    index: int
    q_start: int
    q_len: int
    k_start: int  # 0 with a block table or a dense cache, where the sequence has pages or a row of its own
    k_len: int


@dataclass
class Problem:
    """One attention call, checked. The tensors are the caller's own; nothing is copied.

    q and out are (batch, seqlen_q, heads, head_dim), or (total_q, heads, head_dim) where `cu_seqlens_q` is given; lse is float32,
    (batch, heads, seqlen_q) or (heads, total_q). k and v are (batch, seqlen_k, heads_k, head_dim); (total_k, heads_k, head_dim) where
    `cu_seqlens_k` says where sequences start; or (num_blocks, page_size, heads_k, head_dim) with a `block_table`. `seqused_k`, where
    given, has the last word on key lengths. Windows count keys on either side of the diagonal that ends bottom right; -1 is
    unbounded, and causal is `window_right == 0`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seqused_k: Tensor | None
    block_table: Tensor | None
    scheduler_metadata: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def heads_k(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def page_size(self) -> int | None:
        return self.k.shape[1] if self.paged else None

    def sequences(self) -> Iterator[Sequence]:
        """The sequences of the batch. Reads lengths back to the host: on a GPU this waits."""
        starts_q = range(0, (self.batch + 1) * self.max_seqlen_q, max(self.max_seqlen_q, 1))
        if self.cu_seqlens_q is not None:
            starts_q = self.cu_seqlens_q.tolist()
        elif self.max_seqlen_q == 0:
            starts_q = [0] * (self.batch + 1)
        starts_k = self.cu_seqlens_k.tolist() if self.cu_seqlens_k is not None else None
        used_k = self.seqused_k.tolist() if self.seqused_k is not None else None
        packed = self.k.dim() == 3
        for b in range(self.batch):
            if used_k is not None:
                k_len = used_k[b]
            else:
                k_len = starts_k[b + 1] - starts_k[b] if starts_k is not None else self.max_seqlen_k
            yield Sequence(b, starts_q[b], starts_q[b + 1] - starts_q[b], starts_k[b] if packed else 0, k_len)

    def rows(self, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q and out (q_len, heads, head_dim) and of lse (heads, q_len) for one sequence."""
        if self.cu_seqlens_q is None:
            return self.q[sequence.index], self.out[sequence.index], self.lse[sequence.index]
        rows = slice(sequence.q_start, sequence.q_start + sequence.q_len)
        return self.q[rows], self.out[rows], self.lse[:, rows]

    def keys(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """k and v (k_len, heads_k, head_dim) of one sequence: views, or copies where pages had to be gathered."""
        return self._keys_of(self.k, sequence), self._keys_of(self.v, sequence)

    def _keys_of(self, x: Tensor, sequence: Sequence) -> Tensor:
        if self.block_table is not None:
            pages = self.block_table[sequence.index, : -(-sequence.k_len // x.shape[1])]
            return x[pages.long()].flatten(0, 1)[: sequence.k_len]
        if self.cu_seqlens_k is not None:
            return x[sequence.k_start : sequence.k_start + sequence.k_len]
        return x[sequence.index, : sequence.k_len]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Problem:
    left, right = window_size
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return Problem(
        q=q,
        k=k,
        v=v,
        out=out,
        lse=torch.empty(shape, dtype=torch.float32, device=q.device),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        scheduler_metadata=scheduler_metadata,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale),
        window_left=max(left, -1),
        window_right=0 if causal else max(right, -1),
        softcap=float(softcap),
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )

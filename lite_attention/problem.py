"""One attention call, normalised: what every backend is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Sequence(NamedTuple):
    """Where one sequence of a batch lies: q_len rows of q from q_start on, and k_len keys."""

    index: int
    q_start: int
    q_len: int
    k_start: int  # where its keys start in packed k and v; 0 where it has pages or a row of a dense cache
    k_len: int


@dataclass
class Problem:
    """One attention call, checked. The tensors are the caller's own; nothing is copied.

    - q, out: (batch, seqlen_q, heads, head_dim), or with `cu_seqlens_q` (total_q, heads, head_dim).
    - lse: float32, (batch, heads, seqlen_q) or (heads, total_q).
    - k, v: with `block_table` (num_blocks, page_size, heads_k, head_dim); else with `cu_seqlens_q` packed, (total_k,
      heads_k, head_dim), where `cu_seqlens_k` says where sequences start; else (batch, seqlen_k, heads_k, head_dim).
    - Key lengths: `seqused_k` where given, else `cu_seqlens_k`, else all of k.
    - Windows count the keys seen on either side of the diagonal that ends bottom right; -1 is unbounded, and causal is
      `window_right == 0`.
    - num_splits: 1 forbids to compute a row in parts.
    - k, v are of the dtype of q, or both FP8: then a value is what is stored times `k_descale` or `v_descale`, float32
      (batch, heads_k) of any strides; None is 1.
    - q may be FP8 where k and v are: then out is bfloat16, and the query heads of a KV head share its `q_descale`.
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
    num_splits: int = 0
    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    q_descale: Tensor | None = None

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def packed(self) -> bool:
        return self.varlen and not self.paged

    @property
    def fp8_q(self) -> bool:
        return self.q.dtype == FP8

    @property
    def fp8_kv(self) -> bool:
        return self.k.dtype == FP8

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1 if self.cu_seqlens_q is not None else self.q.shape[0]

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
    def page_size(self) -> int | None:
        return self.k.shape[1] if self.paged else None

    def sequences(self) -> Iterator[Sequence]:
        """The sequences of the batch. Reads lengths back to the host: on a GPU this waits."""
        starts_q = self.cu_seqlens_q.tolist() if self.cu_seqlens_q is not None else None
        starts_k = self.cu_seqlens_k.tolist() if self.cu_seqlens_k is not None else None
        used_k = self.seqused_k.tolist() if self.seqused_k is not None else None
        for b in range(self.batch):
            q_start = starts_q[b] if starts_q is not None else b * self.q.shape[1]
            q_len = starts_q[b + 1] - q_start if starts_q is not None else self.q.shape[1]
            if used_k is not None:
                k_len = used_k[b]
            elif starts_k is not None:
                k_len = starts_k[b + 1] - starts_k[b]
            else:
                k_len = self.max_seqlen_k
            yield Sequence(b, q_start, q_len, starts_k[b] if self.packed else 0, k_len)

    def rows(self, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q and out (q_len, heads, head_dim) and of lse (heads, q_len) of one sequence.

        FP8 queries are a copy with their scale, in float32.
        """
        if self.varlen:
            rows = slice(sequence.q_start, sequence.q_start + sequence.q_len)
            q, out, lse = self.q[rows], self.out[rows], self.lse[:, rows]
        else:
            q, out, lse = self.q[sequence.index], self.out[sequence.index], self.lse[sequence.index]
        return dequantised(q, self.q_factors(sequence.index)), out, lse

    def keys(self, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """k and v (k_len, heads_k, head_dim) of one sequence: views, or copies where pages had to be gathered.

        FP8 keys and values come with their scale, in float32.
        """
        return self._keys_of(self.k, self.k_descale, sequence), self._keys_of(self.v, self.v_descale, sequence)

    def q_factors(self, index: int | Tensor) -> Tensor | None:
        """`q_descale` of one sequence by query heads, (heads,), or of several, (sequences, heads)."""
        if self.q_descale is None:
            return None
        return self.q_descale[index].repeat_interleave(self.heads // self.heads_k, -1)

    def slopes(self, sequence: Sequence) -> Tensor | None:
        """ALiBi slopes (heads,) of one sequence."""
        if self.alibi_slopes is None or self.alibi_slopes.dim() == 1:
            return self.alibi_slopes
        return self.alibi_slopes[sequence.index]

    def _keys_of(self, x: Tensor, descale: Tensor | None, sequence: Sequence) -> Tensor:
        if self.block_table is not None:
            pages = self.block_table[sequence.index, : -(-sequence.k_len // x.shape[1])]
            x = take(x, pages).flatten(0, 1)[: sequence.k_len]
        elif self.packed:
            x = x[sequence.k_start : sequence.k_start + sequence.k_len]
        else:
            x = x[sequence.index, : sequence.k_len]
        return dequantised(x, None if descale is None else descale[sequence.index])


def take(x: Tensor, index: Tensor) -> Tensor:
    """A copy of these pages or rows of x. FP8 goes as bytes, which PyTorch indexes on every device."""
    return as_bytes(x).index_select(0, index).view(x.dtype)


def as_bytes(x: Tensor) -> Tensor:
    """The memory of x where it is FP8, and x itself where it is not."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def dequantised(x: Tensor, descale: Tensor | None) -> Tensor:
    """x (..., heads, head_dim) as it is, or if it is FP8 in float32, times `descale` (..., heads)."""
    if x.dtype != FP8:
        return x
    return x.float() if descale is None else x.float() * descale[..., None]

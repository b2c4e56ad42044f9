"""Tensors for a shape: random, bfloat16 or FP8, laid out as the call wants them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lite_attention.bench.shapes import Shape

FP8 = torch.float8_e4m3fn
EIGHTHS = (4, 12)  # factors of FP8 tensors are such multiples of 1/8: with them a value of FP8 is exact in bfloat16


@dataclass(frozen=True)
class Inputs:
    """What every contender is given. Index tensors are int32.

    - q: "dense" (batch, seqlen_q, heads, head_dim), else (total_q, heads, head_dim).
    - k, v: "dense" (batch, seqlen_k, heads_k, head_dim), "packed" (total_k, heads_k, head_dim), "paged" (num_blocks,
      page_size, heads_k, head_dim).
    - cu_seqlens_q, cu_seqlens_k: (batch + 1,); seqused_k: (batch,).
    - block_table: (batch, max_blocks) where "paged", with pages in random order.
    - descales: "q_descale", "k_descale" and "v_descale" of those that are FP8, float32 (batch, heads_k).
    """

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    block_table: Tensor | None
    descales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def softmax_scale(self) -> float:
        return self.shape.head_dim**-0.5

    def queries(self) -> Tensor:
        """q as (total_q, heads, head_dim)."""
        return rows(self.q)

    def rows_of(self, b: int) -> slice:
        """Where sequence b lies in `queries`."""
        start = sum(self.shape.q_lens[:b])
        return slice(start, start + self.shape.q_lens[b])

    def queries_of(self, b: int) -> Tensor:
        """q of sequence b, (q_len, heads, head_dim): what FP8 stands for, in bfloat16."""
        return self._values("q", self.queries()[self.rows_of(b)], b)

    def keys_of(self, b: int) -> tuple[Tensor, Tensor]:
        """k and v of sequence b, (k_len, heads_k, head_dim), likewise; copies where they had to be gathered."""
        return self._values("k", self._keys_of(self.k, b), b), self._values("v", self._keys_of(self.v, b), b)

    def _keys_of(self, x: Tensor, b: int) -> Tensor:
        length = self.shape.k_lens[b]
        if self.block_table is not None:
            pages = self.block_table[b, : -(-length // self.shape.page_size)]
            same_bytes = x.view(torch.uint8) if x.dtype == FP8 else x  # of which pages can be gathered
            return same_bytes.index_select(0, pages).view(x.dtype).flatten(0, 1)[:length]
        start = sum(self.shape.k_lens[:b])
        return rows(x)[start : start + length]

    def _values(self, name: str, x: Tensor, b: int) -> Tensor:
        if x.dtype != FP8:
            return x
        factors = self.descales[f"{name}_descale"][b].repeat_interleave(x.shape[1] // self.shape.heads_k)
        return (x.float() * factors[:, None]).bfloat16()


def rows(x: Tensor) -> Tensor:
    """(..., heads, head_dim) as (rows, heads, head_dim)."""
    return x.reshape(-1, *x.shape[-2:])


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Normal q, k and v for `shape`."""
    random = torch.Generator(device).manual_seed(seed)
    fp8 = "" if shape.fp8 == "none" else shape.fp8

    def normal(name: str, *size: int) -> Tensor:
        x = torch.randn(size, generator=random, device=device, dtype=torch.bfloat16)
        return x.to(FP8) if name in fp8 else x

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    factors = (shape.batch, shape.heads_k)
    tokens_q, tokens_k, table = (sum(shape.q_lens),), (sum(shape.k_lens),), None
    if shape.layout == "dense":
        tokens_q, tokens_k = (shape.batch, shape.q_lens[0]), (shape.batch, shape.k_lens[0])
    elif shape.layout == "paged":
        table, pages = _block_table(shape, seed)
        tokens_k, table = (pages, shape.page_size), table.to(device)
    return Inputs(
        shape,
        normal("q", *tokens_q, shape.heads, shape.head_dim),
        normal("k", *tokens_k, shape.heads_k, shape.head_dim),
        normal("v", *tokens_k, shape.heads_k, shape.head_dim),
        int32([0, *accumulate(shape.q_lens)]),
        int32([0, *accumulate(shape.k_lens)]),
        int32(shape.k_lens),
        table,
        {f"{name}_descale": torch.randint(*EIGHTHS, factors, generator=random, device=device) / 8 for name in fp8},
    )


def _block_table(shape: Shape, seed: int) -> tuple[Tensor, int]:
    """The block table, with zeros after a sequence's last page, and how many pages there are."""
    counts = [-(-length // shape.page_size) for length in shape.k_lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    table = torch.zeros(shape.batch, max(counts), dtype=torch.int32)
    for b, pages in enumerate(order.split(counts)):
        table[b, : len(pages)] = pages
    return table, sum(counts)

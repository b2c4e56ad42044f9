"""The KV cache of a layer, in pages, and one chunk of tokens that goes into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lite_attention.pages import PAGE, empty_sketch, write_sketch


@dataclass
class Chunk:
    """The next tokens of some sequences, as many of each, and where their keys and values go.

    Attributes:
        table: int32 (rows, blocks), the pages of these sequences.
        starts: the position of each sequence's first token here.
        tokens: how many of each sequence.
    """

    table: Tensor
    starts: Sequence[int]
    tokens: int

    @cached_property
    def positions(self) -> Tensor:
        """(rows, tokens)."""
        starts = torch.tensor(self.starts, device=self.table.device)
        return starts[:, None] + torch.arange(self.tokens, device=self.table.device)

    @cached_property
    def slots(self) -> Tensor:
        """Where each token lies in the cache, in tokens: (rows * tokens,)."""
        return (self.table.gather(1, self.positions // PAGE) * PAGE + self.positions % PAGE).flatten()

    @cached_property
    def completed(self) -> Tensor:
        """Pages that this chunk fills to the end, int32 (n,)."""
        pages = [
            self.table[row, start // PAGE : (start + self.tokens) // PAGE] for row, start in enumerate(self.starts)
        ]
        return torch.cat(pages)

    @cached_property
    def whole(self) -> Batch:
        """Each sequence's tokens as one sequence of queries: dense attention computes them at once."""
        ends = self.positions[:, -1].int() + 1
        return Batch(ends, self.table, self.tokens, max(self.starts) + self.tokens)

    @cached_property
    def steps(self) -> Batch:
        """Each token as the one query of a sequence that ends with it: a decode step of its own."""
        table = self.table.repeat_interleave(self.tokens, dim=0)
        return Batch(self.positions.flatten().int() + 1, table, 1, max(self.starts) + self.tokens)


@dataclass
class Batch:
    """Sequences of one number of queries each, as the attention functions take them."""

    seqused_k: Tensor  # int32 (batch,)
    block_table: Tensor  # int32 (batch, blocks)
    max_seqlen_q: int
    max_seqlen_k: int

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        rows = self.seqused_k.shape[0] * self.max_seqlen_q
        return torch.arange(0, rows + 1, self.max_seqlen_q, dtype=torch.int32, device=self.seqused_k.device)


class PagedLayer:
    """Keys, values and sketches of one layer: (blocks, 16, heads_k, head_dim), and (blocks, heads_k, bytes)."""

    def __init__(self, blocks: int, key: Tensor, sketch_bits: int) -> None:
        """`key`, (..., heads_k, head_dim): what the cache is to hold."""
        self.k, self.v = (key.new_empty(blocks, PAGE, *key.shape[-2:]) for _ in range(2))
        self.sketch = empty_sketch(self.k, sketch_bits)

    def append(self, chunk: Chunk, k: Tensor, v: Tensor) -> None:
        """Writes (rows * tokens, heads_k, head_dim). Sketches of the pages that are full with it are still to write."""
        self.k.flatten(0, 1)[chunk.slots] = k
        self.v.flatten(0, 1)[chunk.slots] = v

    def write_sketches(self, chunk: Chunk) -> None:
        """Of the pages that `chunk` completes."""
        write_sketch(self.k, self.sketch, chunk.completed)

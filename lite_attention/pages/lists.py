"""Which pages a decode step reads: the result of `select_pages`, in the two forms that kernels and people walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.skip.bits import pack, unpack, words


@dataclass(frozen=True, eq=False)
class PageLists:
    """The pages of each sequence and KV head. Page n of a sequence holds its keys 16 n to 16 n + 15.

    Attributes:
        bits: int32, (batch, heads_k, words): page n is bit n % 32 of word n // 32; the others are 0.
        indices: int32, (batch, heads_k, max_blocks): the listed n, ascending. From `counts` on nothing is written.
        counts: int32, (batch, heads_k): how many are listed.
        left_out: float32, (batch, heads): the share of its softmax mass that a query head is estimated to miss, the
            largest over the sequence's query tokens, each with its own list before they are joined; 0 where everything
            is listed.
    """

    bits: Tensor
    indices: Tensor
    counts: Tensor
    left_out: Tensor

    @classmethod
    def empty(cls, batch: int, heads_k: int, heads: int, max_blocks: int, device: torch.device) -> PageLists:
        """Room for lists; what they hold is not yet written."""
        shapes = (batch, heads_k, words(max_blocks)), (batch, heads_k, max_blocks), (batch, heads_k)
        ints = (torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
        return cls(*ints, left_out=torch.empty(batch, heads, device=device))

    @property
    def max_blocks(self) -> int:
        return self.indices.shape[2]

    def listed(self) -> Tensor:
        """Bool, (batch, heads_k, max_blocks): which pages are listed."""
        return unpack(self.bits, self.max_blocks)

    def write(self, index: int, listed: Tensor) -> None:
        """Makes `listed`, bool (heads_k, pages), the lists of sequence `index`."""
        everywhere = torch.zeros(self.indices.shape[1:], dtype=torch.bool, device=listed.device)
        everywhere[:, : listed.shape[1]] = listed
        self.bits[index] = pack(everywhere)
        self.counts[index] = listed.sum(-1)
        for head, of_head in enumerate(listed):
            pages = of_head.nonzero().flatten()
            self.indices[index, head, : pages.shape[0]] = pages

"""Lists of a given length in vLLM, for models of random weights, which need other pages than a trained one does.

Selection runs as always; its result is then overwritten, by one small kernel a layer, with random pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE = 16
ALWAYS = 5  # the newest pages, which every list has


@triton.jit
def _overwrite(
    lengths, drawn, indices, counts, heads, max_blocks, count, least, always: tl.constexpr, block: tl.constexpr
):
    """A program for each row and head: `drawn`, with the newest pages at its end, where at least `least` are held."""
    row = tl.program_id(0)
    held = (tl.load(lengths + row // heads) + 15) // 16
    if held >= least:
        at = tl.arange(0, block)
        inside = at < count
        page = tl.load(drawn + row * count + at, mask=inside, other=0)
        page = tl.where(at >= count - always, held - count + at, page)
        tl.store(indices + row.to(tl.int64) * max_blocks + at, page, mask=inside)
        tl.store(counts + row, count)


class Forced:
    """Stands in for `select_pages`, for rows that hold `pages` or more."""

    def __init__(self, select_pages: object, share: float, pages: int) -> None:
        self.select_pages, self.pages, self.count = select_pages, pages, round(share * pages)
        self._drawn: dict[tuple[int, int], torch.Tensor] = {}

    def draw(self, rows: int, heads: int) -> torch.Tensor:
        """int32 (rows, heads, count), ascending: the first page, random ones before the newest, room for those."""
        generator = torch.Generator().manual_seed(0)
        middle = torch.rand(rows, heads, self.pages - ALWAYS - 1, generator=generator).argsort(-1) + 1
        middle = middle[..., : self.count - 1 - ALWAYS].sort(-1).values
        return torch.nn.functional.pad(middle, (1, ALWAYS)).int()

    def __call__(
        self, q: torch.Tensor, sketch: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, *rest, **kwargs
    ) -> object:
        lists = self.select_pages(q, sketch, starts, lengths, *rest, **kwargs)
        shape = tuple(lists.counts.shape)
        if shape not in self._drawn:  # vLLM runs a step before it captures one of its shape
            self._drawn[shape] = self.draw(*shape).to(q.device)
        self.overwrite(lengths, self._drawn[shape], lists)
        return lists

    def overwrite(self, lengths: torch.Tensor, drawn: torch.Tensor, lists: object) -> None:
        rows, heads = lists.counts.shape
        _overwrite[(rows * heads,)](
            lengths,
            drawn,
            lists.indices,
            lists.counts,
            heads,
            lists.max_blocks,
            self.count,
            self.pages,
            ALWAYS,
            triton.next_power_of_2(self.count),
        )


def force_lists(share: float, pages: int) -> None:
    """Lists of rows that hold `pages` pages or more have that share of so many, in layers of this process."""
    from vllm_plugin import listing

    listing.select_pages = Forced(listing.select_pages, share, pages)

"""Lists of a given length in vLLM, for models of random weights, which need other pages than a trained one does.

Selection runs as always; its result is then overwritten, by one small kernel a layer, with random pages. For that a
step is made of three calls in place of `decode_pages`, and their kernels don't overlap as a server's do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lite_attention.pages import attend_pages, select_pages, write_sketch

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
    """Stands in for `decode_pages`: rows that hold `pages` or more have the lists that are given to them."""

    def __init__(self, share: float, pages: int) -> None:
        self.pages, self.count = pages, round(share * pages)
        self._drawn: dict[tuple[int, int], torch.Tensor] = {}

    def draw(self, rows: int, heads: int) -> torch.Tensor:
        """int32 (rows, heads, count), ascending: the first page, random ones before the newest, room for those."""
        generator = torch.Generator().manual_seed(0)
        middle = torch.rand(rows, heads, self.pages - ALWAYS - 1, generator=generator).argsort(-1) + 1
        middle = middle[..., : self.count - 1 - ALWAYS].sort(-1).values
        return torch.nn.functional.pad(middle, (1, ALWAYS)).int()

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        sketch: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        *rest,
        eps: float,
        filled: torch.Tensor,
        min_context: int,
        newest: int,
        whole: torch.Tensor,
        lists: object,
        scheduler_metadata: torch.Tensor | None,  # of another step, in which the kernels choose the lists
        **attention,
    ) -> tuple[torch.Tensor, torch.Tensor, object]:
        write_sketch(k_cache, sketch, filled)
        chosen = {"eps": eps, "min_context": min_context, "newest": newest, "whole": whole, "lists": lists}
        scores = {name: attention[name] for name in ("softmax_scale", "k_descale")}
        select_pages(q, sketch, starts, lengths, *rest, **chosen, **scores)
        shape = tuple(lists.counts.shape)
        if shape not in self._drawn:  # vLLM runs a step before it captures one of its shape
            self._drawn[shape] = self.draw(*shape).to(q.device)
        self.overwrite(lengths, self._drawn[shape], lists)
        out, lse = attend_pages(q, k_cache, v_cache, lists, starts, lengths, *rest, **attention)
        return out, lse, lists

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

    listing.decode_pages = Forced(share, pages)

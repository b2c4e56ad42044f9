"""What lists read and leave out, summed over decode steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.pages import PAGE, PageLists
from lite_attention.quality.paged import Batch, PagedLayer

ROUNDING = 1e-3  # of a mass, from two float32 sums over 16-bit scores


@dataclass(frozen=True)
class Read:
    """Shares of what dense attention reads, and of softmax mass.

    Attributes:
        pages: bytes of keys and values in listed pages, over those in all visible pages.
        sketches: bytes of sketches, over the same.
        left_out_estimate: mass left out of a query head's softmax by the estimate of the lists, on average.
        left_out: the true one, by comparison with dense attention over the same cache.
        over_budget: the share of (step, query head) whose true mass left out is more than eps.
    """

    pages: float
    sketches: float
    left_out_estimate: float
    left_out: float
    over_budget: float

    @property
    def bytes(self) -> float:
        """Bytes read, over those of dense attention."""
        return self.pages + self.sketches


class Tally:
    """Adds up, for each layer. On a GPU nothing waits before `layers` is asked for."""

    def __init__(self, eps: float) -> None:
        """`eps`: what `over_budget` counts from: in layers with an eps of their own, too, it is what was asked for."""
        self.eps = eps
        self._sums: dict[int, Tensor] = {}

    def add(
        self,
        layer: int,
        cache: PagedLayer,
        steps: Batch,
        lists: PageLists,
        lse: Tensor,
        lse_dense: Tensor,
        *,
        sketched: bool,
    ) -> None:
        """The steps of one call: `lse` over listed keys, `lse_dense` over all, both (heads, steps).

        `sketched`: whether sketches were read for the lists; for an eps of 0 none are.
        """
        heads_k, head_dim = cache.k.shape[2:]
        page_bytes = 2 * PAGE * head_dim * cache.k.element_size()
        visible = ((steps.seqused_k + PAGE - 1) // PAGE).sum() * heads_k
        full = (steps.seqused_k // PAGE).sum() * heads_k
        left_out = (1 - (lse.double() - lse_dense.double()).exp()).clamp(min=0)  # below 0 by rounding
        found = (
            lists.counts.sum() * page_bytes,
            visible * page_bytes,
            full * cache.sketch.shape[2] * sketched,
            lists.left_out.sum(),
            left_out.sum(),
            (left_out > self.eps + ROUNDING).sum(),
            torch.tensor(left_out.numel(), device=lse.device),
        )
        self._add(layer, torch.stack([each.double() for each in found]))

    def add_dense(self, layer: int, cache: PagedLayer, steps: Batch, heads: int) -> None:
        """Steps of a layer that stays dense."""
        heads_k, head_dim = cache.k.shape[2:]
        pages = ((steps.seqused_k + PAGE - 1) // PAGE).sum() * heads_k
        read = pages.double() * (2 * PAGE * head_dim * cache.k.element_size())
        rows = torch.full_like(read, steps.seqused_k.shape[0] * heads)
        nothing = torch.zeros_like(read)
        self._add(layer, torch.stack([read, read, nothing, nothing, nothing, nothing, rows]))

    def _add(self, layer: int, found: Tensor) -> None:
        self._sums[layer] = self._sums[layer] + found if layer in self._sums else found

    def layers(self) -> dict[int, Read]:
        return {layer: _read(sums) for layer, sums in sorted(self._sums.items())}

    def total(self) -> Read:
        """Over all layers."""
        return _read(torch.stack(list(self._sums.values())).sum(0))


def _read(sums: Tensor) -> Read:
    listed, visible, sketches, estimate, left_out, over, rows = sums.tolist()
    return Read(listed / visible, sketches / visible, estimate / rows, left_out / rows, over / rows)

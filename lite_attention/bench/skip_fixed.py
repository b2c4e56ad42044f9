"""Rows whose skip lists stay as they are: random tiles, or runs of tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import lite_attention
from lite_attention.bench.check import Agreement, against_reference
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_work import compare_lists, full_list, tile_samples
from lite_attention.skip.bits import unpack
from lite_attention.skip.skip_list import SkipList

LOWEST = -1e30  # a threshold that drops no tile, while every tile is still voted on


@dataclass(frozen=True)
class Pattern:
    """Lists that skip a share of the tiles: `skipped`.

    Whether a tile is visited is drawn anew, by that share, in one of `run` tiles, and is else as in the tile before. So
    with 1 each tile is random by itself; with more there are runs, of run / skipped visited tiles on average, and run
    / (1 - skipped) skipped ones. The last tile that a q tile sees is always visited.
    """

    skipped: float
    run: int = 1

    def visits(self, size: tuple[int, ...], view: Tensor, seed: int) -> Tensor:
        """Bool (*size, q_tiles, kv_tiles), of q tiles that see `view`, (q_tiles, kv_tiles): each its first tiles."""
        random = torch.Generator().manual_seed(seed)  # of the CPU: the same lists on every device
        anew = torch.rand(*size, *view.shape, generator=random) < 1 / self.run
        drawn = torch.rand(*size, *view.shape, generator=random) >= self.skipped
        tiles = torch.arange(view.shape[1])
        source = torch.where(anew | (tiles == 0), tiles, 0).cummax(-1).values  # where the value of a tile was drawn
        return drawn.gather(-1, source) | (tiles == view.sum(-1, keepdim=True) - 1)

    def prepare(self, inputs: Inputs, seed: int) -> FixedLists:
        return FixedLists(self, inputs, seed)


class FixedLists:
    """Calls that update a list, by votes that all say stay. out is filled with NaN, which a call must overwrite."""

    steps = 1

    def __init__(self, pattern: Pattern, inputs: Inputs, seed: int) -> None:
        shape, device = inputs.shape, inputs.q.device
        full = full_list(shape, torch.device("cpu"))
        view = in_view(full, shape)
        visits = pattern.visits((shape.batch, shape.heads), view, seed)
        self.visited = float((visits & view).sum() / (view.sum() * shape.batch * shape.heads))
        self.pattern, self.seed = pattern, seed
        self.inputs = inputs
        self.expected = visits.to(device)
        self.list = SkipList.from_visits(
            self.expected, (full.block_m, full.block_n), full.max_seqlen_q, full.max_seqlen_k
        )
        self.threshold = torch.full((), LOWEST, device=device)
        self.out = torch.full_like(inputs.q, math.nan)

    def __call__(self) -> Tensor:
        q, k, v = self.inputs.q, self.inputs.k, self.inputs.v
        lite_attention.skip_attention(q, k, v, self.list, self.threshold, causal=self.inputs.shape.causal, out=self.out)
        return self.out

    def visits(self, tile: tuple[int, int]) -> Tensor:
        """What the same pattern visits of a peer's tiles: bool (batch, heads, q_tiles, kv_tiles)."""
        shape = self.inputs.shape
        everything = SkipList.fresh(
            shape.batch, shape.heads, shape.q_lens[0], shape.k_lens[0], tile=tile, device=torch.device("cpu")
        )
        return self.pattern.visits((shape.batch, shape.heads), in_view(everything, shape), self.seed)

    def check(self) -> list[Agreement]:
        self()
        samples = tile_samples(self.inputs, self.expected, (self.list.block_m, self.list.block_n))
        return [against_reference(self.out, samples), self.check_list()]

    def check_list(self) -> Agreement:
        return compare_lists(self.list.visits(), self.expected)


def in_view(skip_list: SkipList, shape: Shape) -> Tensor:
    """Which tiles the shape's mask leaves visible: bool (q_tiles, kv_tiles)."""
    return unpack(skip_list.in_view(window_right=0 if shape.causal else -1), skip_list.kv_tiles)

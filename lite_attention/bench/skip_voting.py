"""A row whose skip lists fill by votes: coherent steps, in which tiles lose their weight in an order that is known.

The first `groups` elements of a head are kept for that. Each KV tile of a head, but the last, belongs to a group, and
its keys have -STRENGTH in the element of that group. Queries have STRENGTH in those of the groups that have lost their
weight, which is one more at each step; each q tile has its own first group, and the others follow in turn. So a tile
falls by STRENGTH ** 2 of the raw score, from about the weight of all others to 2**-30 of it, which no noise of normal
scores takes across the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lite_attention
from lite_attention.bench.check import Agreement, against_reference
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.skip_work import compare_lists, full_list, tile_samples

STRENGTH = 15.5  # exact in bfloat16; its square is 30 in log2 units, at head dim 128
THRESHOLD = -10.0


@dataclass(frozen=True)
class Voting:
    """`steps` calls, whose share of skipped tiles grows evenly from 0 in the first to `skipped` in the last.

    For shapes without a causal mask, with a list of keys for each query head.
    """

    steps: int
    skipped: float

    @property
    def groups(self) -> int:
        return round((self.steps - 1) / self.skipped)

    def prepare(self, inputs: Inputs, seed: int) -> VotingSteps:
        return VotingSteps(self, inputs, seed)


class VotingSteps:
    """A call starts with a list of every tile and takes all steps. out is filled with NaN, for a call to overwrite."""

    def __init__(self, voting: Voting, inputs: Inputs, seed: int) -> None:
        shape, device = inputs.shape, inputs.q.device
        self.steps = voting.steps
        self.list = full_list(shape, device)
        self.threshold = torch.full((), THRESHOLD, device=device)
        self.out = torch.full_like(inputs.q, math.nan)

        random = torch.Generator().manual_seed(seed)  # of the CPU: the same order on every device
        order = torch.rand(shape.heads, self.list.kv_tiles - 1, generator=random).argsort(-1)
        group = (order.argsort(-1) % voting.groups).to(device)
        first = torch.randint(voting.groups, (shape.heads, self.list.q_tiles), generator=random).to(device)
        self.lasts = torch.full((shape.heads, self.list.q_tiles, self.list.kv_tiles), voting.steps, device=device)
        self.lasts[..., :-1] = (group[:, None] - first[..., None]) % voting.groups
        """The last step that visits a tile, (heads, q_tiles, kv_tiles)."""
        self.visited = sum(float(self.visits(step).float().mean()) for step in range(voting.steps)) / voting.steps

        k = _without(inputs.k, voting.groups)
        light = (self.list.kv_tiles - 1) * self.list.block_n  # the keys before the last tile
        _put(k[:, :light], group.repeat_interleave(self.list.block_n, dim=1), -STRENGTH)
        q, self.queries = _without(inputs.q, voting.groups), []
        for step in range(voting.steps):
            element = ((first + step) % voting.groups).repeat_interleave(self.list.block_m, dim=1)
            q = q.clone()
            _put(q, element[:, : q.shape[1]], STRENGTH)
            self.queries.append(q)
        self.inputs = replace(inputs, q=self.queries[0], k=k)

    def visits(self, step: int) -> Tensor:
        """What `step` visits: bool (batch, heads, q_tiles, kv_tiles)."""
        return (self.lasts >= step).expand(self.list.batch, *self.lasts.shape)

    def __call__(self) -> Tensor:
        self.list.reset()
        for step in range(self.steps):
            self._take(step)
        return self.out

    def check(self) -> list[Agreement]:
        """Every step's list, and the results of the first, the middle and the last step."""
        self.list.reset()
        found, sampled = [], {0, self.steps // 2, self.steps - 1}
        for step in range(self.steps):
            self._take(step)
            found.append(compare_lists(self.list.visits(), self.visits(step + 1)))
            if step in sampled:
                inputs = replace(self.inputs, q=self.queries[step])
                samples = tile_samples(inputs, self.visits(step), (self.list.block_m, self.list.block_n))
                found.append(against_reference(self.out, samples))
        return found

    def check_list(self) -> Agreement:
        return compare_lists(self.list.visits(), self.visits(self.steps))

    def _take(self, step: int) -> None:
        lite_attention.skip_attention(
            self.queries[step], self.inputs.k, self.inputs.v, self.list, self.threshold, out=self.out
        )


def _without(x: Tensor, groups: int) -> Tensor:
    """A copy with zeros in the elements of the groups."""
    x = x.clone()
    x[..., :groups] = 0
    return x


def _put(x: Tensor, element: Tensor, value: float) -> None:
    """Writes value to one element of each head and token of x, (batch, tokens, heads, head_dim): (heads, tokens)."""
    x.scatter_(-1, element.T[None, ..., None].expand(*x.shape[:-1], 1), value)

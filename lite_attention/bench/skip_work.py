"""What the rows with skip lists share: what they time, and how its results are checked."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lite_attention.bench.check import Agreement, Sample, allowed_error
from lite_attention.bench.inputs import Inputs
from lite_attention.bench.shapes import Shape
from lite_attention.skip.skip_list import SkipList


class SkipWork(Protocol):
    """Prepared calls with a skip list: a call of it runs `steps` of them and returns `out`.

    Dense contenders compute `inputs`. `visited` is the share of the visible tiles that a step visits, on average.
    """

    inputs: Inputs
    out: Tensor
    steps: int
    visited: float

    def __call__(self) -> Tensor: ...

    def check(self) -> list[Agreement]:
        """Runs it, and holds results and lists against what they should be."""

    def check_list(self) -> Agreement:
        """The list as a call left it."""


class SkipPlan(Protocol):
    """What a row does with skip lists."""

    def prepare(self, inputs: Inputs, seed: int) -> SkipWork: ...


def full_list(shape: Shape, device: torch.device) -> SkipList:
    """A list for `shape`, whose sequences are of one length, that visits every tile."""
    return SkipList.fresh(
        shape.batch, shape.heads, shape.q_lens[0], shape.k_lens[0], head_dim=shape.head_dim, device=device
    )


def compare_lists(found: Tensor, expected: Tensor) -> Agreement:
    """Visits, bool of one shape, or numbers of them: none may differ."""
    wrong = found != expected
    return Agreement("the list as it should be", float(wrong.sum()), 0.0, float(wrong.float().mean()), 0.0)


def tile_samples(inputs: Inputs, visits: Tensor, tile: tuple[int, int]) -> list[Sample]:
    """Dense attention in float32, masked by `visits`, of the first, the middle and the last q tile of each sequence.

    An error may be as large as in `bench.check`. `visits` is bool (batch, heads, q_tiles, kv_tiles) of tiles `tile`.
    """
    last = visits.shape[2] - 1
    return [
        _sample(inputs, visits[b, :, m], b, m, tile)
        for b in range(inputs.shape.batch)
        for m in sorted({0, last // 2, last})
    ]


def _sample(inputs: Inputs, visits: Tensor, b: int, m: int, tile: tuple[int, int]) -> Sample:
    """Of q tile m of sequence b, whose heads have `visits`, (heads, kv_tiles)."""
    shape, (block_m, block_n) = inputs.shape, tile
    q_len, k_len = shape.q_lens[b], shape.k_lens[b]
    start, stop = m * block_m, min((m + 1) * block_m, q_len)
    q = inputs.queries()[inputs.rows_of(b)][start:stop]
    k, v = inputs.keys_of(b)
    device, group = q.device, shape.heads // shape.heads_k
    keys = torch.arange(k_len, device=device)
    seen = keys <= torch.arange(start, stop, device=device)[:, None] + (k_len - q_len if shape.causal else k_len)
    expected, formula = [], []
    for head in range(shape.heads):  # one at a time: a tile's scores of all heads are large
        one = q[:, head], k[:, head // group], v[:, head // group]
        unseen = ~(seen & visits[head, keys // block_n])
        expected.append(_attend(*(x.float() for x in one), unseen, inputs.softmax_scale))
        formula.append(_attend(*one, unseen, inputs.softmax_scale))
    first, exact = inputs.rows_of(b).start, torch.stack(expected, 1)
    return Sample(slice(first + start, first + stop), exact, allowed_error(torch.stack(formula, 1), exact))


def _attend(q: Tensor, k: Tensor, v: Tensor, unseen: Tensor, scale: float) -> Tensor:
    """The formula, each step rounded to the dtype of q: q (n, d) over k, v (m, d), without the keys `unseen` (n, m).

    Rows without a key are zeros: under a causal mask, the last tile that a q tile sees has no key for its first rows.
    """
    weights = ((q @ k.T) * scale).masked_fill_(unseen, -torch.inf).softmax(-1)
    return weights.masked_fill_(unseen.all(-1, keepdim=True), 0) @ v

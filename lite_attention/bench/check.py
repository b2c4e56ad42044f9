"""Whether results are right, before anything is timed.

Blocks of rows are held against the float32 reference by the rule of FlashAttention's own tests: an error may be twice
that of the plain formula in bfloat16, plus twice that of rounding at 0.3. This needs no peer.

The whole output is held against each peer. Both may err by what the rule allows, so they may differ by twice that. An
absolute bound says little of rows over many keys, whose outputs are small, so relative ones go with it. Two right
kernels differ by their bfloat16 weights and outputs: some 0.2% in each row. A peer over FP8 rounds weights to it, and
queries where ours have 16 bits, 3% each: it is held to LOOSENED times the bounds, and only to see that it did the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention import reference
from lite_attention.bench.inputs import Inputs, rows

BLOCK = 16  # rows held against the reference at a time
ERROR = 1e-2  # of the whole: the norm of the difference over that of the result
ROW_ERROR = 2.0**-5  # the same of one row of one head
LOOSENED = 10.0  # bounds on peers over FP8
ROWS_AT_ONCE = 1 << 20  # compared in float32 at a time


@dataclass(frozen=True)
class Agreement:
    """How far two results lie apart: at most `difference`, where `allowed` is, and in norms `error` and `row_error`."""

    against: str
    difference: float
    allowed: float
    error: float
    row_error: float
    loosened: float = 1.0

    @property
    def right(self) -> bool:
        """False also for NaN, which compares with nothing."""
        most, most_of_row = self._norms()
        return self.difference <= self.allowed and self.error <= most and self.row_error <= most_of_row

    def __str__(self) -> str:
        most, most_of_row = self._norms()
        return (
            f"against {self.against} off by up to {self.difference:.2g} ({self.allowed:.2g} allowed), "
            f"{self.error:.2%} in norm ({most:.2%}), {self.row_error:.2%} in the worst row ({most_of_row:.2%})"
        )

    def _norms(self) -> tuple[float, float]:
        return self.loosened * ERROR, self.loosened * ROW_ERROR


@dataclass(frozen=True)
class Sample:
    """What rows `place` of out should be, (rows, heads, head_dim) float32, and the error that is allowed there."""

    place: slice
    expected: Tensor
    allowed: float


def samples(inputs: Inputs) -> list[Sample]:
    """Blocks of rows at the start, inside and at the end of a few sequences, the longest and shortest among them."""
    return [
        _sample(inputs, b, start) for b in _sequences(inputs.shape.k_lens) for start in _starts(inputs.shape.q_lens[b])
    ]


def allowed_error(formula: Tensor, expected: Tensor) -> float:
    """What a result may be off by: `formula` is the plain one in bfloat16, `expected` float32."""
    rounded = expected.to(formula.dtype)
    error = (formula.float() - expected).abs().max()
    return float(2 * error + 2 * (rounded + 0.3 - 0.3 - rounded).float().abs().max())


def against_reference(out: Tensor, expected: list[Sample]) -> Agreement:
    """The worst of all samples, each judged by what is allowed to it: so `allowed` is that of the worst."""
    found = [compare("reference", rows(out)[one.place], one.expected, one.allowed) for one in expected]
    wrong = [one for one in found if not one.right]
    return (wrong or sorted(found, key=lambda one: one.difference - one.allowed))[-1]


def against_peer(name: str, out: Tensor, theirs: Tensor, expected: list[Sample], loosened: float = 1.0) -> Agreement:
    """The whole of out against a peer's."""
    allowed = 2 * max(one.allowed for one in expected)
    return compare(name, rows(out), rows(theirs), loosened * allowed, loosened)


def compare(against: str, ours: Tensor, theirs: Tensor, allowed: float, loosened: float = 1.0) -> Agreement:
    """(rows, heads, head_dim) each; `loosened` multiplies the bounds on norms.

    NaN anywhere makes NaN of what it touches, and the result wrong.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{against}: got a result {tuple(theirs.shape)}; needs {tuple(ours.shape)}")
    difference, squares, total, row_error = (torch.zeros((), device=ours.device) for _ in range(4))
    step = max(1, ROWS_AT_ONCE // ours.shape[1])
    for a, b in zip(ours.split(step), theirs.split(step), strict=True):
        delta, b = a.float() - b.float(), b.float()
        difference = difference.maximum(delta.abs().max())
        one, norm = delta.square().sum(-1), b.square().sum(-1)
        squares, total = squares + one.sum(), total + norm.sum()
        row_error = row_error.maximum((one / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sqrt().max())
    error = (squares / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
    return Agreement(against, float(difference), allowed, float(error), float(row_error), loosened)


def _sequences(k_lens: tuple[int, ...]) -> list[int]:
    by_length = sorted(range(len(k_lens)), key=k_lens.__getitem__)
    return sorted({0, len(k_lens) - 1, by_length[0], by_length[-1]})


def _starts(q_len: int) -> list[int]:
    last = max(0, q_len - BLOCK)
    return sorted({0, last // 3, 2 * last // 3, last})


def _sample(inputs: Inputs, b: int, start: int) -> Sample:
    shape, place = inputs.shape, inputs.rows_of(b)
    q = inputs.queries_of(b)[start : start + BLOCK]
    k, v = inputs.keys_of(b)
    if shape.causal:  # the last row of the block sees this many
        seen = shape.k_lens[b] - shape.q_lens[b] + start + len(q)
        k, v = k[:seen], v[:seen]
    expected, _ = reference.attend(q, k, v, softmax_scale=inputs.softmax_scale, window_right=0 if shape.causal else -1)
    formula = _in_bfloat16(q, k, v, inputs.softmax_scale, shape.causal)
    first = place.start + start
    return Sample(slice(first, first + len(q)), expected, allowed_error(formula, expected))


def _in_bfloat16(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """The formula, each step rounded to the dtype of q: q (n, heads, d) over k, v (m, heads_k, d), to (n, heads, d)."""
    (n, heads, d), (m, heads_k, _) = q.shape, k.shape
    q = q.view(n, heads_k, heads // heads_k, d).permute(1, 2, 0, 3).reshape(heads_k, -1, d)
    scores = ((q @ k.permute(1, 2, 0)) * scale).view(heads_k, heads // heads_k, n, m)
    if causal:
        unseen = torch.ones(n, m, dtype=torch.bool, device=q.device).triu_(m - n + 1)
        scores.masked_fill_(unseen, -math.inf)
    out = scores.softmax(-1).view(heads_k, -1, m) @ v.transpose(0, 1)
    return out.view(heads, n, d).transpose(0, 1)

"""Thresholds on trial in one layer, beside its dense calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.module import LiteAttention

Span = tuple[int, int]
"""(begin, end), end excluded."""


class Trial:
    """A `LiteAttention` with thresholds on trial that makes each call of a layer again: keeps lists, and no tensors.

    Args:
        module: the layer's; the trial refreshes its lists when that does.
        thresholds: float32, (steps, heads).
    """

    def __init__(self, module: LiteAttention, thresholds: Tensor) -> None:
        steps, heads = thresholds.shape
        self.attention = LiteAttention(
            threshold=thresholds,
            causal=module.causal,
            window_size=module.window_size,
            num_steps=steps,
            refresh_every=module.refresh_every,
            stats_steps=steps,
            tile=module.tile,
            backend=module.backend,
        )
        self._difference, self._norm = torch.zeros(2, steps, heads, dtype=torch.float64)
        self._calls: dict[str, int] = {}

    @torch.inference_mode()
    def note(self, call: dict[str, Any], dense: Tensor) -> None:
        """Makes a call of the layer, whose dense output is given."""
        arguments = {name: x for name, x in call.items() if name not in ("self", "return_softmax_lse")}
        out = self.attention(**arguments)
        step = self._calls.get(call["stream"], 0)
        self._calls[call["stream"]] = step + 1
        self._difference[step] += _squares(out.float() - dense.float())
        self._norm[step] += _squares(dense.float())

    def errors(self, step_ranges: Sequence[Span], head_groups: Sequence[Span]) -> list[list[float]]:
        """|out - dense| / |dense|, L2, over all streams: of each head group, by step range.

        Raises:
            ValueError: dense attention gives NaN or infinity.
        """
        if not self._norm.isfinite().all():
            raise wrong("inputs", "NaN or infinity in the output of dense attention", "finite values")
        return [
            [
                _ratio(*(x[first:last, begin:end].sum().item() for x in (self._difference, self._norm)))
                for first, last in step_ranges
            ]
            for begin, end in head_groups
        ]

    def sparsity(self, head_groups: Sequence[Span]) -> list[float]:
        """Of each head group, the mean over all calls."""
        by_head = torch.stack([stats.sparsity.mean(0) for stats in self.attention.stats().values()]).mean(0)
        return [by_head[begin:end].mean().item() for begin, end in head_groups]

    @property
    def tile(self) -> tuple[int, int]:
        """(block_m, block_n)."""
        visits = self.attention.skip_list(self.attention.streams[0])
        return visits.block_m, visits.block_n


def _squares(x: Tensor) -> Tensor:
    """The sum of squares of each head of (batch, seqlen, heads, head_dim), on the CPU."""
    return torch.linalg.vector_norm(x, dim=(0, 1, 3), dtype=torch.float64).square().cpu()


def _ratio(difference: float, norm: float) -> float:
    return math.sqrt(difference / norm) if norm else 0.0

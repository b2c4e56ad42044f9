"""The thresholds of one group of heads: the highest that keep its output near dense attention over the recorded steps.

Lists are temporal: what leaves one at a step stays out of all later ones. So a threshold is tried on the whole rest of
the sequence, by a `LiteAttention` that is given the recorded calls, and step ranges are searched in their order: with
those before as they were found, while after the range nothing more leaves the list. An error is of the calls of one
step range, of all streams: |out - dense| / |dense|, L2.

What a range takes off the lists shows in all later ones. Errors of disjoint sets of tiles add up nearly in squares; so
that there is something left for the later ranges, range r of R may use up (r + 1) / R of the square of the target.

The error rises with the threshold, but for a tile whose neighbours were dropped first. The bisection doesn't depend on
it: the threshold that it ends at is one that was tried and kept within the target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.calibration.recording import Call
from lite_attention.checks import wrong
from lite_attention.module import LiteAttention

LOWEST = -40.0


@dataclass(frozen=True)
class Found:
    """Thresholds by step range, the largest error of a range, mean sparsity, and (block_m, block_n)."""

    thresholds: tuple[float, ...]
    error: float
    sparsity: float
    tile: tuple[int, int]


def search(
    calls: Sequence[Call],
    module: LiteAttention,
    step_ranges: Sequence[tuple[int, int]],
    target: float,
    tolerance: float,
    done: Callable[[], None],
) -> Found:
    """Searches the thresholds for `calls` of some heads of `module`; calls `done` after each step range."""
    steps = _by_step(calls)
    heads = calls[0].q.shape[2]
    chosen: list[float] = []
    start = _simulator(module, len(steps))
    for r, (begin, end) in enumerate(step_ranges):
        allowed = target * math.sqrt((r + 1) / len(step_ranges))
        low, high = -1, _grid(tolerance)  # places in the grid of thresholds: what keeps within `allowed`, what doesn't
        while high - low > 1:
            middle = (low + high) // 2
            trial = copy.deepcopy(start)
            trial.set_threshold(_schedule([*chosen, _threshold(middle, tolerance)], step_ranges, heads))
            if max(_errors(trial, steps, step_ranges[r:])) <= allowed:
                low = middle
            else:
                high = middle
        chosen.append(_threshold(low, tolerance))
        start.set_threshold(_schedule(chosen, step_ranges, heads))
        _errors(start, steps, [(begin, end)])
        done()
    final = _simulator(module, len(steps))
    final.set_threshold(_schedule(chosen, step_ranges, heads))
    error = max(_errors(final, steps, step_ranges))
    if error > target:
        raise wrong("target", target, f"more than {error}, to which rounding alone comes")
    sparsity = [stats.mean for stats in final.stats().values()]
    visits = final.skip_list(final.streams[0])
    return Found(tuple(chosen), error, sum(sparsity) / len(sparsity), (visits.block_m, visits.block_n))


def _grid(tolerance: float) -> int:
    """Thresholds in the grid: from LOWEST to 0."""
    return math.floor(-LOWEST / tolerance) + 1


def _threshold(place: int, tolerance: float) -> float:
    return -math.inf if place < 0 else -(_grid(tolerance) - 1 - place) * tolerance


def _by_step(calls: Sequence[Call]) -> list[list[Call]]:
    """The calls of each step, one of each stream."""
    streams: dict[str, list[Call]] = {}
    for call in calls:
        streams.setdefault(call.stream, []).append(call)
    return [list(step) for step in zip(*streams.values(), strict=True)]


def _simulator(module: LiteAttention, num_steps: int) -> LiteAttention:
    return LiteAttention(
        causal=module.causal,
        window_size=module.window_size,
        num_steps=num_steps,
        refresh_every=module.refresh_every,
        stats_steps=num_steps,
        tile=module.tile,
        backend=module.backend,
    )


def _schedule(thresholds: Sequence[float], step_ranges: Sequence[tuple[int, int]], heads: int) -> Tensor:
    """(num_steps, heads): nothing leaves the list in ranges that have no threshold yet."""
    schedule = torch.full((step_ranges[-1][1], heads), -math.inf)
    for threshold, (begin, end) in zip(thresholds, step_ranges, strict=False):
        schedule[begin:end] = threshold
    return schedule


@torch.inference_mode()
def _errors(simulator: LiteAttention, steps: list[list[Call]], step_ranges: Sequence[tuple[int, int]]) -> list[float]:
    """Gives the simulator the calls of these ranges, in which it stands at the first; returns the error of each."""
    errors = []
    for begin, end in step_ranges:
        difference = norm = 0.0
        for call in (call for step in steps[begin:end] for call in step):
            q, k, v, dense = (x.to(call.device) for x in (call.q, call.k, call.v, call.out))
            out = simulator(q, k, v, **call.options, stream=call.stream)
            difference += (out.double() - dense.double()).square().sum().item()
            norm += dense.double().square().sum().item()
        if not math.isfinite(norm):
            raise wrong("inputs", "NaN or infinity in the output of dense attention", "finite values")
        errors.append(math.sqrt(difference / norm) if norm else 0.0)
    return errors

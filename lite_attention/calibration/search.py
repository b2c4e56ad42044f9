"""The highest thresholds that keep attention near dense attention, by bisection, of all layers and head groups at once.

Lists are temporal: what leaves one at a step stays out of all later ones. So thresholds are tried on whole runs of the
model. It computes dense attention, and beside each call the same call is made with skip lists: layers and heads don't
influence each other, each is measured on the q, k and v of the dense run, and a run is one step of the bisection for
all of them. It needs no memory but for lists, where to keep q, k and v of one video would take terabytes.

Step ranges are searched in their order: with those before as they were found, while after the range nothing more leaves
the lists. What a range takes off them shows in all later ones. Errors of disjoint sets of tiles add up nearly in
squares; so that there is something left for the later ranges, range r of R may use up (r + 1) / R of the square of the
target.

The error rises with the threshold, but for a tile whose neighbours were dropped first. The bisection doesn't depend on
it: the threshold that it ends at is one that was tried and kept within the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.calibration.trial import Span, Trial
from lite_attention.calibration.watch import watched
from lite_attention.checks import wrong
from lite_attention.module import LiteAttention

LOWEST = -40.0


@dataclass(frozen=True)
class Plan:
    """What is searched. `head_groups` of each layer, by name."""

    step_ranges: tuple[Span, ...]
    head_groups: dict[str, tuple[Span, ...]]
    tolerance: float

    @property
    def steps(self) -> int:
        return self.step_ranges[-1][1]

    @property
    def grid(self) -> int:
        """Thresholds that there are to choose from, from LOWEST to 0."""
        return math.floor(-LOWEST / self.tolerance) + 1

    @property
    def rounds(self) -> int:
        """Trials that a bisection takes, between no threshold and beyond the grid."""
        return math.ceil(math.log2(self.grid + 1))

    @property
    def runs(self) -> int:
        return len(self.step_ranges) * self.rounds + 1

    def threshold(self, place: int) -> float:
        """Of a place in the grid; -1 is -inf."""
        return -math.inf if place < 0 else -(self.grid - 1 - place) * self.tolerance

    def schedule(self, layer: str, places: Sequence[Sequence[int]]) -> Tensor:
        """(steps, heads), of the places of each head group by step range; ranges that have none yet drop nothing."""
        table = torch.full((self.steps, self.head_groups[layer][-1][1]), -math.inf)
        for (begin, end), of_group in zip(self.head_groups[layer], places, strict=True):
            for (first, last), place in zip(self.step_ranges, of_group, strict=False):
                table[first:last, begin:end] = self.threshold(place)
        return table


@dataclass(frozen=True)
class Found:
    """Of a layer: thresholds by head group and step range, the largest error and the sparsity of each group, tiles."""

    thresholds: list[list[float]]
    errors: list[float]
    sparsity: list[float]
    tile: tuple[int, int]


def search(
    modules: dict[str, LiteAttention],
    run: Callable[[], object],
    plan: Plan,
    target: float,
    done: Callable[[], None],
) -> dict[str, Found]:
    """Searches the thresholds of all layers; calls `run` for each trial, and then `done`."""

    def attempt(places: dict[str, list[list[int]]]) -> dict[str, Trial]:
        trials = {layer: Trial(modules[layer], plan.schedule(layer, x)) for layer, x in places.items()}
        with watched(modules, lambda layer, call, dense: trials[layer].note(call, dense)):
            run()
        done()
        return trials

    chosen: dict[str, list[list[int]]] = {layer: [[] for _ in groups] for layer, groups in plan.head_groups.items()}
    for r in range(len(plan.step_ranges)):
        allowed = target * math.sqrt((r + 1) / len(plan.step_ranges))
        # Of each head group: a place that keeps within what is allowed, and one above it that doesn't.
        bounds = {layer: [[-1, plan.grid] for _ in groups] for layer, groups in plan.head_groups.items()}
        for _ in range(plan.rounds):
            middles = {layer: [(low + high) // 2 for low, high in x] for layer, x in bounds.items()}
            trials = attempt(
                {
                    layer: [[*before, place] for before, place in zip(chosen[layer], x, strict=True)]
                    for layer, x in middles.items()
                }
            )
            for layer, trial in trials.items():
                errors = trial.errors(plan.step_ranges[r:], plan.head_groups[layer])
                for bound, place, of_group in zip(bounds[layer], middles[layer], errors, strict=True):
                    if place > bound[0]:  # else this group's bisection has ended
                        bound[0 if max(of_group) <= allowed else 1] = place
        for layer, x in bounds.items():
            for before, (low, _) in zip(chosen[layer], x, strict=True):
                before.append(low)
    trials = attempt(chosen)
    return {layer: _found(layer, trial, chosen[layer], plan, target) for layer, trial in trials.items()}


def _found(layer: str, trial: Trial, places: list[list[int]], plan: Plan, target: float) -> Found:
    groups = plan.head_groups[layer]
    errors = [max(of_group) for of_group in trial.errors(plan.step_ranges, groups)]
    if max(errors) > target:
        raise wrong(
            "target", target, f"more than {max(errors)}, to which rounding alone comes in {layer or 'the module'}"
        )
    thresholds = [[plan.threshold(place) for place in of_group] for of_group in places]
    return Found(thresholds, errors, trial.sparsity(groups), trial.tile)

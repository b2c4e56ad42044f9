"""`calibrate`: the thresholds of a model for an error that the caller names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from lite_attention.calibration.progress import progress
from lite_attention.calibration.search import LOWEST, Found, Plan, search
from lite_attention.calibration.thresholds import HeadGroup, Layer, Thresholds
from lite_attention.calibration.trial import Span
from lite_attention.calibration.watch import Survey, afresh, watched
from lite_attention.checks import wrong
from lite_attention.collect import lite_modules

ROUNDS = 8  # of lowering the target for the sake of the output
CAUTION = 0.8


def calibrate(
    model: nn.Module,
    inputs: Callable[[], Tensor | None] | Iterable[tuple | dict],
    target: float,
    *,
    output_target: float | None = None,
    head_groups: int = 1,
    step_ranges: int = 1,
    tolerance: float = 0.25,
) -> Thresholds:
    """Searches the highest thresholds with which attention stays within `target` of dense attention.

    There is a threshold for each layer, group of heads and range of steps. It is measured over all steps of a prompt,
    since what leaves a list stays out of it: the model runs dense, and beside each call of a `LiteAttention` the same
    call is made with skip lists. A run is one step of a bisection, of all layers and heads at once, so that there are
    8 runs for a step range, each of at most twice the attention, and no memory is needed but for lists. The same inputs
    give the same thresholds. `lite_attention.calibration.search` says more.

    Args:
        model: a `LiteAttention`, or a model with some, by whatever way they came in, before `torch.compile`. Their
            `num_steps` must be given where there is more than one step range. It gets the thresholds, and its streams
            start afresh.
        inputs: all the calls of one prompt. Either a function without arguments that makes them, as a pipeline of
            diffusers does; it is called several times and must do the same each time, so it seeds its noise. Its
            result, if that is a tensor, is the model's output. Or the arguments of each call in turn, tuples or dicts;
            the output is that of the last.
        target: largest relative error, |out - dense| / |dense| in L2, of the attention output of any head group in any
            step range, for the same q, k and v.
        output_target: largest relative error of the model's output, to which the errors of all layers and steps add
            up. Where it is exceeded, the search is made again with a lower target. None measures it, and leaves it.
        head_groups: parts of equal size, or nearly, that the query heads of a layer are split into; each has thresholds
            of its own.
        step_ranges: parts of equal size, or nearly, that the steps are split into.
        tolerance: distance of the thresholds that are tried, in log2 units; they lie between -40 and 0. Twice as much
            saves a run for each step range.

    Returns:
        The thresholds; `save_thresholds` writes them to a file, and `load_thresholds` gives those to a model.

    Raises:
        ValueError: an argument out of range; a model without LiteAttention; inputs whose streams make different numbers
            of calls, or not num_steps; a target that rounding alone exceeds.
        RuntimeError: rich, for the progress bar, is not installed.
    """
    _check(target, output_target, head_groups, step_ranges, tolerance)
    modules = lite_modules(model)
    if not modules:
        raise wrong("model", f"{type(model).__name__} without LiteAttention", "a LiteAttention, or a model with some")
    run = _runner(model, inputs)
    survey = Survey()
    with watched(modules, survey.note):
        dense_output = run()
    if output_target is not None and dense_output is None:
        raise wrong("output_target", output_target, "None, as inputs gives no tensor whose error could be measured")
    steps = survey.steps(modules)
    if step_ranges > 1 and any(module.num_steps is None for module in modules.values()):
        raise wrong("step_ranges", step_ranges, "1, or LiteAttention modules with num_steps")
    groups = {layer: _split("head_groups", head_groups, heads) for layer, (heads, _) in survey.heads.items()}
    plan = Plan(_split("step_ranges", step_ranges, steps), groups, tolerance)
    for _ in range(ROUNDS):
        with progress(plan.runs, f"runs, target {target:.3g}") as done:
            found = search(modules, run, plan, target, done)
        thresholds = _assemble(survey, found, target, plan)
        thresholds.apply(model)
        if dense_output is None:
            return thresholds
        with afresh(modules, skipping=True):
            error = _relative_error(run(), dense_output)
        if output_target is None or error <= output_target:
            return replace(thresholds, output_error=error)
        target *= CAUTION * output_target / error  # errors of outputs and of layers are about proportional
    raise wrong("output_target", output_target, f"more: with attention within {thresholds.target} it was still {error}")


def _check(
    target: float,
    output_target: float | None,
    head_groups: int,
    step_ranges: int,
    tolerance: float,
) -> None:
    for name, number in (("target", target), ("output_target", output_target)):
        if number is not None and not (isinstance(number, (int, float)) and 0 < number < math.inf):
            raise wrong(name, number, "a positive number")
    if not (isinstance(tolerance, (int, float)) and 0 < tolerance <= -LOWEST):
        raise wrong("tolerance", tolerance, f"a positive number of at most {-LOWEST}")
    for name, number in (("head_groups", head_groups), ("step_ranges", step_ranges)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise wrong(name, number, "a positive int")


def _runner(model: nn.Module, inputs: Callable[[], object] | Iterable[tuple | dict]) -> Callable[[], Tensor | None]:
    """Makes all calls of a prompt, and returns the output, if there is one."""
    calls = None if callable(inputs) else list(inputs)

    @torch.no_grad()
    def run() -> Tensor | None:
        output = inputs() if calls is None else None
        for call in calls or ():
            output = model(**call) if isinstance(call, dict) else model(*call)
        output = output[0] if isinstance(output, tuple) else output
        return output.detach().cpu() if isinstance(output, Tensor) else None

    return run


def _assemble(survey: Survey, found: dict[str, Found], target: float, plan: Plan) -> Thresholds:
    layers = []
    for name, one in found.items():
        columns = zip(plan.head_groups[name], one.thresholds, one.errors, one.sparsity, strict=True)
        groups = tuple(HeadGroup(begin, end, tuple(of_group), *rest) for (begin, end), of_group, *rest in columns)
        layers.append(Layer(name, survey.heads[name][1], one.tile, groups))
    return Thresholds(target, None, plan.steps, plan.step_ranges, tuple(layers))


def _split(name: str, parts: int, count: int) -> tuple[Span, ...]:
    """`count` things in `parts` spans that follow each other."""
    if parts > count:
        raise wrong(name, parts, f"at most the {count} that inputs has")
    return tuple(pairwise(count * i // parts for i in range(parts + 1)))


def _relative_error(x: Tensor, reference: Tensor) -> float:
    x, reference = x.double(), reference.double()
    return ((x - reference).norm() / reference.norm()).item()

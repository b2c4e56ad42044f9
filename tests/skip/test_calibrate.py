"""Calibration: the thresholds that it finds, against lists kept by hand; its file; thresholds that differ by step."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from lite_attention import (
    LiteAttention,
    SkipList,
    calibrate,
    flash_attn_func,
    lite_modules,
    load_thresholds,
    save_thresholds,
    skip_attention,
)
from lite_attention.calibration.file import read_thresholds
from lite_attention.calibration.trial import Trial

pytest.importorskip("rich", reason="needs rich and tomlkit: pip install 'lite-attention[calibrate]'")
pytest.importorskip("tomlkit", reason="needs rich and tomlkit: pip install 'lite-attention[calibrate]'")

STEPS, TOKENS, DIM, TILE = 6, 40, 8, (8, 4)
TOLERANCE = 0.5


def steps_of(seed, heads=4, heads_k=4, steps=STEPS):
    """q, k, v of each step, which change a little from one to the next."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda h: torch.randn(1, TOKENS, h, DIM, generator=random)  # noqa: E731
    sharpness = torch.linspace(1, 2, heads)[:, None]  # of a head's attention
    base = [normal(heads) * sharpness, normal(heads_k) * 1.5, normal(heads_k)]
    return [[x + 0.1 * normal(x.shape[2]) for x in base] for _ in range(steps)]


def attention(**options):
    return LiteAttention(**{"num_steps": STEPS, "tile": TILE} | options)


def by_hand(steps, thresholds, refresh_every=None):
    """Output of each step, and the sparsity of each head, with a threshold (steps, heads); lists start full."""
    heads = steps[0][0].shape[2]
    skip_list = SkipList.fresh(1, heads, TOKENS, TOKENS, tile=TILE)
    outs, left_out = [], []
    for step, ((q, k, v), threshold) in enumerate(zip(steps, thresholds, strict=True)):
        if refresh_every and step % refresh_every == 0:
            skip_list.reset()
        left_out.append(1 - skip_list.visits().float().mean((0, 2, 3)))
        outs.append(skip_attention(q, k, v, skip_list, threshold.contiguous())[0])
    return torch.stack(outs), torch.stack(left_out)


def dense(steps):
    return torch.stack([flash_attn_func(*step) for step in steps])


def errors(outs, reference, ranges, begin, end):
    """The error of query heads [begin, end) in each step range."""
    found = []
    for first, last in ranges:
        x, y = (z[first:last, :, :, begin:end].double() for z in (outs, reference))
        found.append(((x - y).norm() / y.norm()).item())
    return found


def schedule(layer, ranges):
    """Thresholds of a layer as (steps, heads)."""
    table = torch.empty(ranges[-1][1], layer.num_heads)
    for group in layer.groups:
        for threshold, (first, last) in zip(group.thresholds, ranges, strict=True):
            table[first:last, group.begin : group.end] = threshold
    return table


class Model(nn.Module):
    """Two layers of attention, each of another kind of calls; the output is the sum of theirs."""

    def __init__(self, **options):
        super().__init__()
        self.first = attention(**options)
        self.second = attention(**options)

    def forward(self, q, k, v, stream="cond"):
        return self.first(q, k, v, stream=stream) + self.second(q, k.flip(1) * 0.5, v, stream=stream)


@pytest.mark.parametrize("target", [0.05, 0.1, 0.2])
def test_the_highest_that_keeps_the_target(target):
    steps = steps_of(0)
    found = calibrate(attention(), steps, target, tolerance=TOLERANCE)
    (group,) = found.layers[0].groups
    reference, ranges = dense(steps), ((0, STEPS),)
    assert found.step_ranges == ranges and (group.begin, group.end) == (0, 4)
    outs, left_out = by_hand(steps, torch.full((STEPS, 4), group.thresholds[0]))
    (error,) = errors(outs, reference, ranges, 0, 4)
    assert error <= target
    assert group.error == pytest.approx(error, rel=1e-6) == found.error
    assert group.sparsity == pytest.approx(left_out.mean().item(), abs=1e-6) == found.sparsity
    assert group.sparsity > 0
    beyond, _ = by_hand(steps, torch.full((STEPS, 4), group.thresholds[0] + TOLERANCE))
    assert errors(beyond, reference, ranges, 0, 4)[0] > target


@pytest.mark.parametrize("heads_k", [4, 2])
def test_head_groups_and_step_ranges(heads_k):
    """Each group keeps the target in each range, the first range its part; each is the highest that does."""
    steps, target = steps_of(1, heads_k=heads_k), 0.1
    found = calibrate(attention(), steps, target, head_groups=2, step_ranges=2, tolerance=TOLERANCE)
    ranges, (layer,) = found.step_ranges, found.layers
    assert ranges == ((0, 3), (3, 6)) and [(g.begin, g.end) for g in layer.groups] == [(0, 2), (2, 4)]
    reference, table = dense(steps), schedule(layer, ranges)
    outs, left_out = by_hand(steps, table)
    for group in layer.groups:
        heads = slice(group.begin, group.end)
        assert group.error == pytest.approx(max(errors(outs, reference, ranges, group.begin, group.end)), rel=1e-6)
        assert group.error <= target
        assert group.sparsity == pytest.approx(left_out[:, heads].mean().item(), abs=1e-6)
        for r, part in enumerate((math.sqrt(0.5), 1.0)):
            tried = table.clone()
            tried[3 * r + 3 :, heads] = -math.inf
            assert max(errors(by_hand(steps, tried)[0], reference, ranges, group.begin, group.end)) <= target * part
            tried[3 * r : 3 * r + 3, heads] += TOLERANCE
            assert max(errors(by_hand(steps, tried)[0], reference, ranges, group.begin, group.end)) > target * part
    assert layer.groups[0].thresholds != layer.groups[1].thresholds


def test_the_model_gets_them():
    """Its next prompt is that of lists kept by hand, with the streams that it had fresh."""
    steps, model = steps_of(2), attention(enable_skipping=False)
    model(*steps[0], stream="before")
    found = calibrate(model, steps, 0.1, step_ranges=3, tolerance=TOLERANCE)
    assert not model.enable_skipping and not model._forward_hooks
    assert all(model.skip_list(stream).visits().all() for stream in model.streams)
    model.enable_skip_optimization()
    outs = torch.stack([model(*step) for step in steps])
    table = schedule(found.layers[0], found.step_ranges)
    assert torch.equal(model.threshold, table) and table[0, 0] != table[-1, 0]
    torch.testing.assert_close(outs, by_hand(steps, table)[0], rtol=0, atol=0)


def test_lists_are_refreshed_as_in_the_module():
    steps = steps_of(3)
    often, never = (calibrate(attention(refresh_every=n), steps, 0.05, tolerance=TOLERANCE) for n in (2, None))
    (group,) = often.layers[0].groups
    outs, left_out = by_hand(steps, torch.full((STEPS, 4), group.thresholds[0]), refresh_every=2)
    assert group.error == pytest.approx(errors(outs, dense(steps), ((0, STEPS),), 0, 4)[0], rel=1e-6)
    assert group.sparsity == pytest.approx(left_out.mean().item(), abs=1e-6)
    assert group.thresholds[0] > never.layers[0].groups[0].thresholds[0]


def test_streams_have_lists_of_their_own():
    """And one threshold: the error is of both."""
    streams = {name: steps_of(seed) for name, seed in (("cond", 4), ("uncond", 5))}
    calls = [
        dict(zip("qkv", step, strict=True), stream=name)
        for pair in zip(*streams.values(), strict=True)
        for name, step in zip(streams, pair, strict=True)
    ]
    found = calibrate(attention(), calls, 0.1, tolerance=TOLERANCE)
    (group,) = found.layers[0].groups
    table = torch.full((STEPS, 4), group.thresholds[0])
    outs = torch.cat([by_hand(steps, table)[0] for steps in streams.values()])
    reference = torch.cat([dense(steps) for steps in streams.values()])
    assert group.error == pytest.approx(errors(outs, reference, ((0, 2 * STEPS),), 0, 4)[0], rel=1e-6)


def test_forced_tiles_count():
    """Where all tiles are visited by must_do_list, no threshold does harm."""
    steps = [dict(zip("qkv", step, strict=True), must_do_list=[(0, TOKENS)]) for step in steps_of(6)]
    (group,) = calibrate(attention(), steps, 1e-3, tolerance=TOLERANCE).layers[0].groups
    assert group.thresholds == (0.0,) and group.sparsity == 0


def test_runs():
    """One for shapes, five for each step range where there are 21 thresholds, one with what was found.

    In all of them the model is dense, whatever thresholds it had.
    """
    steps, model, runs = steps_of(7), attention(threshold=-1.0), []
    calibrate(
        model, lambda: runs.append(torch.stack([model(*step) for step in steps])), 0.1, step_ranges=2, tolerance=2
    )
    assert len(runs) == 1 + 2 * 5 + 1
    assert all(torch.equal(outs, dense(steps)) for outs in runs)
    assert not torch.allclose(torch.stack([model(*step) for step in steps]), dense(steps))


def test_the_bar_is_told_of_every_run(monkeypatch):
    """Of each search one bar, which has all runs when it goes."""
    from rich.progress import Progress

    bars, stop = [], Progress.stop

    def noting(bar):
        bars.append([(task.total, task.completed) for task in bar.tasks])
        stop(bar)

    monkeypatch.setattr(Progress, "stop", noting)
    steps, model, runs = steps_of(8), Model(), []

    def run():
        runs.append(None)
        return torch.stack([model(*step) for step in steps])

    calibrate(model, run, 0.2, output_target=0.02, step_ranges=2, tolerance=2)
    searches = [2 * 5 + 1] * len(bars)
    assert bars == [[(count, count)] for count in searches] and len(bars) > 1
    assert len(runs) == 1 + sum(searches) + len(bars)  # one for shapes, one after each search for the output's error


def test_a_target_that_rounding_exceeds_is_refused(monkeypatch):
    """As on a GPU, where attention that skips nothing is that of dense kernels up to rounding."""
    errors = Trial.errors
    monkeypatch.setattr(Trial, "errors", lambda *args: [[max(x, 1e-7) for x in group] for group in errors(*args)])
    with pytest.raises(ValueError, match="target: got 1e-12; needs more than 1e-07, to which rounding alone comes"):
        calibrate(attention(), steps_of(0), 1e-12)


def test_output_error():
    steps, model = steps_of(8), Model()
    run = lambda: torch.stack([model(*step) for step in steps])  # noqa: E731
    model.eval()
    for module in lite_modules(model).values():
        module.enable_skip_optimization(False)
    reference = run()
    for module in lite_modules(model).values():
        module.enable_skip_optimization(True)
        module.reset_skip_state()

    loose = calibrate(model, run, 0.2, tolerance=TOLERANCE)
    assert loose.output_error == pytest.approx(((run() - reference).norm() / reference.norm()).item(), rel=1e-5)
    assert loose.target == 0.2 and loose.output_error > 0.08
    tight = calibrate(model, run, 0.2, output_target=0.08, tolerance=TOLERANCE)
    assert tight.output_error <= 0.08 and tight.error <= tight.target < 0.2
    assert 0 < tight.sparsity < loose.sparsity
    assert tight.output_error == pytest.approx(((run() - reference).norm() / reference.norm()).item(), rel=1e-5)


def test_a_result_that_is_no_tensor_has_no_error():
    model = attention()
    run = lambda: [model(*step) for step in steps_of(9)]  # noqa: E731
    assert calibrate(model, run, 0.1, tolerance=8.0).output_error is None
    with pytest.raises(ValueError, match=r"output_target: got 0.1; needs None"):
        calibrate(model, run, 0.1, output_target=0.1)


def test_twice_the_same():
    one, two = (calibrate(Model(), steps_of(10), 0.05, head_groups=4, tolerance=2.0) for _ in range(2))
    assert one == two


# The file


@pytest.fixture(scope="module")
def found():
    """Of a model with two layers, head groups and step ranges; one threshold is -inf."""
    thresholds = calibrate(Model(), steps_of(11), 0.1, head_groups=2, step_ranges=2, tolerance=2.0)
    first, second = thresholds.layers
    never = dataclasses.replace(first.groups[0], thresholds=(-math.inf, -2.0))
    return dataclasses.replace(thresholds, layers=(dataclasses.replace(first, groups=(never, first.groups[1])), second))


def test_file(found, tmp_path):
    path = tmp_path / "thresholds.toml"
    save_thresholds(found, path)
    assert "\nthresholds = [-inf, -2.0]\n" in path.read_text()
    model = Model()
    assert load_thresholds(model, path) == found == read_thresholds(path)
    for layer, module in zip(found.layers, lite_modules(model).values(), strict=True):
        assert torch.equal(module.threshold, schedule(layer, found.step_ranges))
    save_thresholds(dataclasses.replace(found, output_error=None), path)
    assert read_thresholds(path).output_error is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("num_steps = 6\n", "", "without 'num_steps'"),
        ("num_steps = 6", "num_steps = 7", "step_ranges are .* which don't end at 7"),
        ("step_ranges = [[0, 3]", "step_ranges = [[0, 2]", "don't follow each other from 0"),
        ("[-inf, -2.0]", "[-inf, 2.0]", r"thresholds of first are \(-inf, 2.0\), not 2 of at most 0"),
        ("[-inf, -2.0]", "[-2.0]", "not 2 of at most 0"),
        ("[-inf, -2.0]", "[-2.0, nan]", "not 2 of at most 0"),
        ("heads = [0, 2]", "heads = [0, 1]", "heads of first"),
        ("tile = [8, 4]", "tile = [8]", "two whole numbers"),
        ("num_steps = 6", "num_steps = = 6", "where"),
        ("num_steps = 6", 'num_steps = "six"', "don't end at six"),
    ],
)
def test_broken_files(found, tmp_path, old, new, message):
    path = tmp_path / "thresholds.toml"
    save_thresholds(found, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    model = Model()
    with pytest.raises(ValueError, match=message):
        load_thresholds(model, path)
    assert model.first.threshold == -10


def renamed():
    model = Model()
    model.third = model.second
    del model.second
    return model


def called(heads):
    model = Model()
    model(*steps_of(0, heads, heads)[0])
    return model


@pytest.mark.parametrize(
    "model, message",
    [
        (
            renamed,
            "without the layers second; with the further layers third; needs those of the thresholds, first, sec",
        ),
        (lambda: Model(num_steps=None), "first with num_steps=None; needs that of the thresholds, 6"),
        (lambda: Model(num_steps=7), "first with num_steps=7; needs that of the thresholds, 6"),
        (lambda: Model(tile=(16, 16)), r"first with tiles of \(16, 16\); needs \(8, 4\)"),
        (lambda: called(8), "first with 8 heads; needs 4"),
    ],
)
def test_models_that_do_not_fit(found, tmp_path, model, message):
    save_thresholds(found, tmp_path / "thresholds.toml")
    with pytest.raises(ValueError, match=f"model: got .*{message}"):
        load_thresholds(model(), tmp_path / "thresholds.toml")


def test_heads_that_show_at_the_first_call(found):
    model = Model()
    found.apply(model)
    with pytest.raises(ValueError, match=r"threshold: got shape \(6, 4\); needs \(\) or \(6, 8\), as q has heads"):
        model(*steps_of(0, 8, 8)[0])


def test_without_step_ranges_the_number_of_steps_is_free():
    model = attention(num_steps=None)
    calibrate(model, steps_of(12), 0.1, tolerance=2.0)
    assert model.threshold.shape == (4,)


# What it refuses


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target": 0.0}, "target: got 0.0; needs a positive number"),
        ({"target": math.nan}, "target: got nan"),
        ({"output_target": -1.0}, "output_target: got -1.0"),
        ({"tolerance": 41}, "tolerance: got 41; needs a positive number of at most 40"),
        ({"head_groups": 0}, "head_groups: got 0; needs a positive int"),
        ({"head_groups": 5}, "head_groups: got 5; needs at most the 4 that"),
        ({"step_ranges": 7}, "step_ranges: got 7; needs at most the 6 that"),
        ({"head_groups": True}, "head_groups: got True; needs a positive int"),
        ({"inputs": steps_of(0)[:5]}, "inputs: got .*'default': 5.*; needs num_steps=6"),
        ({"inputs": []}, "inputs: got"),
        ({"model": nn.Linear(2, 2)}, "model: got Linear without LiteAttention"),
        ({"model": attention(num_steps=None), "step_ranges": 2}, "step_ranges: got 2; needs 1, or .* with num_steps"),
        ({"inputs": [[x * math.nan for x in step] for step in steps_of(0)]}, "inputs: got NaN or infinity"),
    ],
)
def test_refusals(arguments, message):
    arguments = {"model": attention(), "inputs": steps_of(0), "target": 0.1} | arguments
    with pytest.raises(ValueError, match=message):
        calibrate(**arguments)


def test_streams_of_different_lengths():
    calls = [dict(zip("qkv", step, strict=True), stream=name) for name in "ab" for step in steps_of(0)]
    with pytest.raises(ValueError, match=r"'a': 6, 'b': 5.*; needs the same number"):
        calibrate(attention(num_steps=None), calls[:-1], 0.1)


def test_missing_libraries(found, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    with pytest.raises(RuntimeError, match=r"tomlkit: pip install 'lite-attention\[calibrate\]'"):
        save_thresholds(found, tmp_path / "thresholds.toml")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(RuntimeError, match=r"rich: pip install 'lite-attention\[calibrate\]'"):
        calibrate(attention(), steps_of(0), 0.1)


# Thresholds of each step, in the module


def test_a_threshold_for_each_step():
    steps = steps_of(13)
    table = torch.tensor([-1.0, -6.0, -math.inf, -0.5, -3.0, -2.0])[:, None] + torch.tensor([0.0, -1.0, -0.5, -2.0])
    expected, _ = by_hand(steps, table)
    module = attention(threshold=table)
    for _ in range(2):  # prompts
        torch.testing.assert_close(torch.stack([module(*step) for step in steps]), expected, rtol=0, atol=0)
    module = attention()
    module(*steps[0])
    state = module._states["default"].threshold
    module.set_threshold(table)  # in place, after a call
    module.reset_skip_state()
    torch.testing.assert_close(torch.stack([module(*step) for step in steps]), expected, rtol=0, atol=0)
    assert module._states["default"].threshold is state
    module.set_threshold(-1.0)
    constant, _ = by_hand(steps, torch.full((STEPS, 4), -1.0))
    torch.testing.assert_close(torch.stack([module(*step) for step in steps]), constant, rtol=0, atol=0)


def test_a_threshold_for_each_step_compiled():
    steps = steps_of(14)
    table = torch.linspace(-4, -1, STEPS)[:, None].expand(STEPS, 4).contiguous()
    module = torch.compile(attention(threshold=table), backend="eager", fullgraph=True)
    torch.testing.assert_close(torch.stack([module(*step) for step in steps]), by_hand(steps, table)[0])


@pytest.mark.parametrize("shape", [(STEPS - 1, 4), (STEPS, 4, 1)])
def test_thresholds_of_other_steps(shape):
    with pytest.raises(ValueError, match=f"threshold: got torch.float32 of .*, with num_steps={STEPS}"):
        attention(threshold=torch.full(shape, -1.0))
    module = attention()
    module(*steps_of(0)[0])
    with pytest.raises(ValueError, match="threshold"):
        module.set_threshold(torch.full(shape, -1.0))
    with pytest.raises(ValueError, match="threshold: got 3 values; needs one, or one for each of 4 heads"):
        module.set_threshold(torch.full((STEPS, 3), -1.0))
    copied = copy.deepcopy(module)
    assert copied.threshold == -10

"""The benchmark's rows of listed pages: what they read, and what their checks catch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lite_attention.bench import page_work, rows
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.measure import Measurement
from lite_attention.bench.page_work import NeededPages, RandomPages, SketchedPrefill
from lite_attention.bench.shapes import Shape
from lite_attention.bench.table import judged
from lite_attention.bench.targets import OURS, OWN_DENSE, Target
from lite_attention.pages import write_sketch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
STEP = Shape((1, 1), (4096, 2001), 4, 2, 64, causal=True, layout="paged", page_size=16)
PREFILL = Shape((300,), (300,), 4, 2, 64, causal=True, layout="paged", page_size=16)
PLANS = {
    "random": RandomPages(0.2),
    "needed": NeededPages(0.3),
    "8bits": NeededPages(0.3, sketch_bits=8),
    "short": NeededPages(min_context=8192),
}


def measured(plan, shape):
    """The result of a row, with a clock by which all calls take as long."""
    row = rows.Row("pages-test", shape, (Target(OWN_DENSE, 1.0),), skip=plan)
    return Measurement(CPU, (), 2, lambda call: (call(), 10.0)[1], lambda text: None).measure(row, shape)


def test_every_row_and_target_of_the_issue_is_there():
    expected = {f"pages-random-{percent}-b64-32k": ("FA3", x) for percent, x in ((20, 4.5), (10, 8.0), (5, 14.0))}
    expected |= {f"pages-step-{size}": ("FA3", x) for size, x in (("b64-32k", 5.0), ("b8-128k", 5.0), ("b1-128k", 2.5))}
    expected |= {"pages-short-b64-4k": (OWN_DENSE, 0.98), "pages-prefill-8k": (OWN_DENSE, 0.99)}
    found = {row.name: row for row in rows.ROWS if row.name.startswith("pages-")}
    assert {name: [(one.against, one.at_least) for one in row.targets] for name, row in found.items()} == {
        name: [target] for name, target in expected.items()
    }
    assert all((row.shape.heads, row.shape.heads_k, row.shape.head_dim) == (32, 8, 128) for row in found.values())


def test_rows_of_contexts_force_lists_and_run_by_their_own_name_alone():
    found = rows.select(["pages-context-*"])
    sizes = {(row.shape.k_lens[0], row.shape.batch): row for row in found}
    assert len(found) == 15 and set(sizes) == {(1024 * n, b) for n in (1, 2, 4, 8, 16) for b in (1, 8, 64)}
    step = next(row for row in rows.ROWS if row.name == "pages-step-b64-32k")
    for (tokens, batch), row in sizes.items():
        assert row.name == f"pages-context-{tokens // 1024}k-b{batch}"
        assert row.targets == () and row.skip == step.skip == NeededPages(0.10, min_context=0)
        assert row.shape == replace(step.shape, q_lens=(1,) * batch, k_lens=(tokens,) * batch)
    for patterns in (None, ["*"], ["pages-*"], ["pages-step-*"]):
        assert not {row.name for row in rows.select(patterns)} & {row.name for row in found}
    assert rows.select(["pages-step-*", "pages-context-16k-b8"])[-1].shape.k_lens == (16 * 1024,) * 8


@pytest.mark.parametrize("plan", [*PLANS.values()], ids=[*PLANS])
def test_rows_of_steps_are_measured_and_read_their_share(plan):
    result = measured(plan, STEP)
    assert result.status == "measured", result.reason
    assert set(result.times) == {OURS, OWN_DENSE}
    name = next(name for name, x in PLANS.items() if x is plan)
    expected = {"random": 0.2, "needed": 0.3, "8bits": 0.3, "short": 1.0}[name]
    assert result.visited == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("name", "visited"), [("1k-b1", 9 / 64), ("2k-b1", 0.1)])
def test_rows_of_contexts_are_measured_beside_dense_attention_and_judged_by_nothing(name, visited):
    """Of the shortest context's 64 pages five are always listed, and four query heads have as many for themselves."""
    row = next(row for row in rows.FURTHER if row.name == f"pages-context-{name}")
    result = Measurement(CPU, (), 2, lambda call: (call(), 10.0)[1], lambda text: None).measure(row, row.shape)
    assert result.status == "measured", result.reason
    assert set(result.times) == {OURS, OWN_DENSE}
    assert result.visited == pytest.approx(visited, abs=0.01)
    assert judged(result) == "nothing asked"


def test_the_row_of_a_prompt_is_measured():
    result = measured(SketchedPrefill(), PREFILL)
    assert result.status == "measured" and result.visited == 1.0


@pytest.mark.parametrize("plan", [*PLANS.values()], ids=[*PLANS])
def test_wrong_results_are_caught(plan, monkeypatch):
    name = "attend_pages" if plan is PLANS["random"] else "decode_pages"
    right = getattr(page_work, name)

    def almost(*args, out, **kwargs):
        right(*args, out=out, **kwargs)
        out[-1, 3] += 0.02

    work = plan.prepare(make_inputs(STEP, CPU, seed=0), seed=1)
    assert all(one.right for one in work.check())
    monkeypatch.setattr(page_work, name, almost)
    assert not all(one.right for one in work.check())


def test_a_changed_list_and_a_broken_budget_are_caught(monkeypatch):
    work = NeededPages(0.3).prepare(make_inputs(STEP, CPU, seed=0), seed=1)
    assert all(one.right for one in work.check()) and work.check_list().right
    work.lists.bits[0, 0, 3] ^= 4
    assert not work.check_list().right
    decode = page_work.decode_pages

    def with_too_much_left_out(*args, lists, **kwargs):
        decode(*args, lists=lists, **kwargs)
        lists.left_out[1, 2] = 0.2

    monkeypatch.setattr(page_work, "decode_pages", with_too_much_left_out)
    assert not all(one.right for one in work.check())


def test_of_a_step_that_leaves_nothing_out_the_counts_are_held_to():
    """Kernels may leave the bits as they were."""
    work = PLANS["short"].prepare(make_inputs(STEP, CPU, seed=0), seed=1)
    assert all(one.right for one in work.check())
    work.lists.bits.fill_(5)
    work.lists.indices.fill_(-1)
    assert work.check_list().right
    work.lists.counts[1, 0] -= 1
    assert not work.check_list().right


def test_a_step_writes_its_sketches_and_is_told_of_its_plan(monkeypatch):
    planned = []
    monkeypatch.setattr(page_work, "plan_of", lambda *args: planned.append(args) or torch.zeros(3).int())
    inputs = make_inputs(STEP, CPU, seed=0)
    work = PLANS["short"].prepare(inputs, seed=1)
    assert planned == [(inputs, 8192)]
    given = {}
    monkeypatch.setattr(page_work, "decode_pages", lambda *args, **kwargs: given.update(kwargs))
    work()
    assert given["scheduler_metadata"] is work.metadata and given["min_context"] == 8192
    assert given["filled"].tolist() == [int(inputs.block_table[0, 0]), -1]


def test_a_page_without_its_sketch_is_caught():
    work = SketchedPrefill().prepare(make_inputs(PREFILL, CPU, seed=0), seed=1)
    assert all(one.right for one in work.check())
    assert work.check_list().right
    work.sketch[work.inputs.block_table[0, 17].long()] ^= 255
    assert not work.check_list().right


@pytest.mark.parametrize("second", [-8.0, -7.0])
def test_of_keys_as_far_from_the_mean_either_may_be_apart(second):
    """A sketch that has the other key apart is right where both are as far, and else is not."""
    work = SketchedPrefill().prepare(make_inputs(PREFILL, CPU, seed=0), seed=1)
    page = int(work.inputs.block_table[0, 17])
    work.inputs.k[page] = 0.0
    work.inputs.k[page, 3, :, 1], work.inputs.k[page, 11, :, 1] = 8.0, second
    work()
    assert work.check_list().right
    work.inputs.k[page, 3, :, 1] = 6.0  # so that the other one is farther
    write_sketch(work.inputs.k, work.sketch, torch.tensor([page], dtype=torch.int32))
    work.inputs.k[page, 3, :, 1] = 8.0
    assert work.check_list().right is (second == -8.0)

"""The benchmark's rows with skip lists: their lists, what their checks catch, and the ideal they are held against."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import lite_attention
from lite_attention.bench import rows
from lite_attention.bench.check import against_reference
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.measure import Measurement
from lite_attention.bench.peer_torch import SDPA
from lite_attention.bench.results import RowResult
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern
from lite_attention.bench.skip_voting import Voting
from lite_attention.bench.skip_work import tile_samples
from lite_attention.bench.table import verdict
from lite_attention.bench.targets import IDEAL, OURS, OWN_DENSE, Target
from lite_attention.bench.timing import Time
from lite_attention.cli import main

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
SHAPES = {causal: Shape((300,), (900,), 2, 2, 128, causal=causal) for causal in (False, True)}
VOTED = Shape((300,), (1900,), 2, 2, 128, causal=False)
BY_NAME = {row.name: row for row in rows.ROWS if row.name.startswith("skip-")}


@pytest.fixture(params=SHAPES, ids=["full", "causal"])
def work(request):
    return Pattern(0.5, run=2).prepare(make_inputs(SHAPES[request.param], CPU, seed=0), seed=1)


def measured(plan, shape, peers=()):
    """The result of a row, with a clock by which all calls take as long."""
    row = rows.Row("skip-test", shape, (Target(IDEAL, 0.95),), skip=plan)
    return Measurement(CPU, peers, 2, lambda call: (call(), 10.0)[1], lambda text: None).measure(row, shape)


def test_every_row_and_target_of_the_issue_is_there():
    ideal = {20: 0.95, 40: 0.95, 60: 0.95, 80: 0.97, 90: 0.95}
    expected = {"skip-voting-75600-h12": {IDEAL: 0.95}}
    for shape in ("full-32k-h40", "full-75600-h12", "causal-32k-h40", "causal-75600-h12"):
        expected[f"skip-{shape}-0"] = {OWN_DENSE: 0.98}
        for kind in ("random", "runs"):
            for percent, at_least in ideal.items():
                expected[f"skip-{shape}-{kind}-{percent}"] = {IDEAL: at_least}
                if "causal" not in shape:
                    expected[f"skip-{shape}-{kind}-{percent}"]["FA4 sparse"] = 1.00
                if percent in (80, 90):
                    expected[f"skip-{shape}-{kind}-{percent}"]["FA3"] = {80: 4.8, 90: 9.3}[percent]
    assert {name: {one.against: one.at_least for one in row.targets} for name, row in BY_NAME.items()} == expected
    for name, row in BY_NAME.items():
        tokens, heads = (75600, 12) if "75600" in name else (32768, 40)
        assert row.shape == Shape((tokens,), (tokens,), heads, heads, 128, causal="causal" in name)
    assert BY_NAME["skip-voting-75600-h12"].skip == Voting(steps=50, skipped=0.8)


# Lists.


@pytest.mark.parametrize("skipped", [0.0, 0.2, 0.8, 0.9])
@pytest.mark.parametrize("run", [1, 4])
def test_patterns_skip_their_share_in_runs_and_visit_the_last_tile(skipped, run):
    view = torch.ones(400, 300, dtype=torch.bool).tril_(-50)
    view[:, 0] = True
    visits = Pattern(skipped, run).visits((1, 2), view, seed=3)
    assert torch.equal(visits, Pattern(skipped, run).visits((1, 2), view, seed=3))
    last = view.sum(-1) - 1
    assert visits[..., torch.arange(400), last].all()
    free = visits[:, :, :50, 1:]  # of q tiles that see the first tile only
    assert 1 - float(free.float().mean()) == pytest.approx(skipped, abs=0.03)
    ends = free[..., :-1] & ~free[..., 1:]
    assert float(ends.sum() / free[..., :-1].sum()) == pytest.approx(skipped / run, abs=0.02)


def test_random_lists_are_of_another_seed_another():
    view = torch.ones(8, 40, dtype=torch.bool)
    assert not torch.equal(*(Pattern(0.5).visits((1, 1), view, seed) for seed in (0, 1)))


def test_a_fixed_list_is_voted_on_and_stays(work):
    assert all(one.right for one in work.check())
    shape = work.inputs.shape
    seen = torch.ones(300, 900).tril_(600) if shape.causal else torch.ones(300, 900)
    view = torch.stack([rows.amax(0) for rows in seen.split(work.list.block_m)])
    view = torch.stack([keys.amax(1) for keys in view.split(work.list.block_n, dim=1)], 1).bool()
    assert work.visited == pytest.approx(float(work.expected[:, :, view].float().mean()))
    assert 0 < work.visited < 1


def test_a_tile_that_left_is_found(work):
    work()
    work.list.bits[0, 1, 0, 0] ^= 1
    assert not work.check_list().right and work.check_list().difference == 1


def test_a_result_of_another_list_is_wrong(work):
    out = work().clone()
    tile = work.list.block_m, work.list.block_n
    visits = work.expected.clone()
    assert against_reference(out, tile_samples(work.inputs, visits, tile)).right
    visits[0, 1, 0, 0] = ~visits[0, 1, 0, 0]
    assert not against_reference(out, tile_samples(work.inputs, visits, tile)).right


# Votes.


def test_tiles_lose_their_weight_in_the_order_that_is_known():
    voting = Voting(steps=9, skipped=0.8)
    work = voting.prepare(make_inputs(VOTED, CPU, seed=0), seed=1)
    found = work.check()
    assert len(found) == 9 + 3 and all(one.right for one in found)
    shares = [float(work.visits(step).float().mean()) for step in range(9)]
    assert shares[0] == 1 and all(a > b for a, b in itertools.pairwise(shares))
    assert 1 - float(work.visits(8)[..., :-1].float().mean()) == pytest.approx(0.8, abs=0.1)
    assert work.visited == pytest.approx(sum(shares) / 9)
    assert work().isfinite().all() and work.check_list().right


def test_the_row_of_the_issue_skips_eighty_percent_at_last():
    voting = BY_NAME["skip-voting-75600-h12"].skip
    assert (voting.steps - 1) / voting.groups == pytest.approx(0.8, abs=0.005)


def test_a_threshold_of_no_votes_is_found(monkeypatch):
    right = lite_attention.skip_attention
    monkeypatch.setattr(lite_attention, "skip_attention", lambda *args, **kwargs: right(*args, **kwargs, update=False))
    result = measured(Voting(steps=4, skipped=0.5), VOTED)
    assert result.status == "mismatch" and "the list as it should be" in result.reason


# Rows.


class SparsePeer(SDPA):
    """Attends by lists of its own tiles, in the plain formula; `bits` of them it gets wrong."""

    lists_name, lists_tile = "sparse", (100, 90)

    def __init__(self, bits: int = 0) -> None:
        self.bits = bits

    def lacks_lists(self, shape):
        return "no causal lists" if shape.causal else None

    def prepare_lists(self, inputs, visits):
        visits = visits.clone()
        visits.flatten()[: self.bits] ^= True
        seen = visits.repeat_interleave(100, dim=2)[:, :, :300].repeat_interleave(90, dim=3)[..., : inputs.k.shape[1]]
        q, k, v = (x.transpose(1, 2).float() for x in (inputs.q, inputs.k, inputs.v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return lambda: out.transpose(1, 2).to(inputs.q.dtype)


def test_a_peer_with_lists_of_its_own_takes_part():
    result = measured(Pattern(0.5), SHAPES[False], [SparsePeer()])
    assert result.status == "measured", result.reason
    assert result.microseconds.keys() == {OURS, OWN_DENSE, "SDPA", "sparse"}


def test_a_peer_with_wrong_lists_takes_none():
    result = measured(Pattern(0.5), SHAPES[False], [SparsePeer(bits=1)])
    assert result.status == "measured" and "sparse" not in result.microseconds
    assert result.absent["sparse"].startswith("wrong: ")


def test_a_peer_without_causal_lists_says_so():
    result = measured(Pattern(0.5), SHAPES[True], [SparsePeer()])
    assert result.status == "measured" and result.absent["sparse"] == "no causal lists"


@pytest.mark.parametrize(("plan", "steps"), [(Pattern(0.5), 1), (Voting(steps=4, skipped=0.5), 4)])
def test_a_row_is_checked_and_timed_beside_dense_attention(plan, steps):
    result = measured(plan, VOTED, [SDPA()])
    assert result.status == "measured", result.reason
    assert result.microseconds == {OURS: 10.0 / steps, OWN_DENSE: 10.0, "SDPA": 10.0}
    against = [one.against for one in result.agreements]
    assert against[:2] == ["reference", "SDPA"] and against[-2:] == ["itself before timing", "the list as it should be"]
    assert against.count("reference") > 1 and against.count("the list as it should be") > 1
    assert result.rate(OURS) == pytest.approx(VOTED.flops * result.visited / (10.0 / steps) / 1e6)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = lite_attention.skip_attention

    def wrong(*args, out, **kwargs):
        right(*args, out=out, **kwargs)
        out[..., -1, 1, :] *= 0.9

    monkeypatch.setattr(lite_attention, "skip_attention", wrong)
    result = measured(Pattern(0.5), SHAPES[True])
    assert result.status == "mismatch" and result.reason.startswith("against reference") and not result.times


@pytest.mark.parametrize(("fa3", "best"), [(90.0, 18.0), (120.0, 20.0)])
def test_the_ideal_is_of_the_faster_dense_kernel(fa3, best):
    row = BY_NAME["skip-causal-32k-h40-random-80"]
    times = {OURS: 20.0, OWN_DENSE: 100.0, "FA3": fa3}
    result = RowResult(row, row.shape, times={name: Time(x, x, x) for name, x in times.items()}, visited=0.2)
    assert result.microseconds[IDEAL] == pytest.approx(best)
    found = {one.target.against: one.ratio for one in result.verdicts()}
    assert found == {IDEAL: pytest.approx(best / 20), "FA3": pytest.approx(fa3 / 20)}
    del result.times["FA3"]  # then what is ideal isn't known
    assert verdict(result.verdicts()) == "no ideal, no FA3"


def test_the_command_writes_shares_and_no_picture_of_rates(tmp_path):
    name = "skip-full-75600-h12-random-80"
    arguments = ["--device", "cpu", "--scale", "0.004", "--repetitions", "1", "--only", name, "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["name"] == name and 0 < row["visited"] <= 1 and row["ideal_microseconds"] is None
    assert math.isfinite(row["microseconds"][OWN_DENSE]["median"])
    text = (tmp_path / "README.md").read_text()
    assert f"| {row['visited']:.1%} |" in text and "Visited is the share" in text
    assert not (tmp_path / "rates.png").exists()

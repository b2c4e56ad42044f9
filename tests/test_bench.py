"""The benchmark: its arithmetic, what its checks catch, how it takes turns, and what it writes, all on the CPU."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import subprocess
import sys
import types
from dataclasses import replace

import oracle
import pytest
import torch

import lite_attention
from lite_attention.bench import check, command, environment, measure, peers, rows, timing
from lite_attention.bench.ceilings import Ceilings
from lite_attention.bench.contenders import Ours
from lite_attention.bench.inputs import make_inputs
from lite_attention.bench.peer_fa3 import FA3, LIBRARY, find_fa3
from lite_attention.bench.peer_fa4 import FA4
from lite_attention.bench.peer_torch import SDPA, CuDNN
from lite_attention.bench.results import RowResult, Run
from lite_attention.bench.shapes import Shape
from lite_attention.bench.table import average_line, cells, header, markdown, verdict
from lite_attention.bench.targets import (
    BEST,
    BEST_OF,
    OURS,
    OWN_CONTIGUOUS,
    Average,
    Target,
    judge,
    judge_average,
    ratio,
)
from lite_attention.bench.timing import Time
from lite_attention.cli import main

pytest.importorskip("rich")
image = pytest.importorskip("matplotlib.image")

CPU = torch.device("cpu")
BY_NAME = {row.name: row for row in rows.ROWS}
SHAPES = {
    "full": Shape((40,) * 2, (40,) * 2, 4, 4, 64, causal=False),
    "causal": Shape((40,) * 2, (40,) * 2, 4, 4, 64, causal=True),
    "chunk": Shape((24,), (70,), 4, 2, 64, causal=True),
    "packed": Shape((5, 33, 1), (5, 40, 17), 4, 2, 64, causal=True, layout="packed"),
    "paged": Shape((20,), (50,), 4, 2, 64, causal=True, layout="paged", page_size=16),
    "decode": Shape((1, 1, 1), (3, 64, 41), 8, 2, 64, causal=True, layout="paged", page_size=16, planned=True),
    "mixed": Shape((30, 1, 4), (77, 64, 41), 8, 2, 64, causal=True, layout="paged", page_size=16, planned=True),
    "fp8-decode": Shape((1, 1), (77, 64), 8, 2, 64, causal=True, layout="paged", page_size=16, planned=True, fp8="kv"),
    "fp8-prefill": Shape((40, 40), (70, 70), 4, 2, 64, causal=False, fp8="qkv"),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def bench(out, *arguments):
    """Exit status of the command on the CPU, and its JSON by row."""
    status = main(["bench", "--device", "cpu", "--out", str(out), "--repetitions", "2", *arguments])
    return status, {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


# What there is to do.


def test_flops_and_bytes_are_those_of_the_mask(shape):
    seen = sum(
        oracle.sees(i, j, q, k, shape.causal, (-1, -1))
        for q, k in zip(shape.q_lens, shape.k_lens, strict=True)
        for i in range(q)
        for j in range(k)
    )
    assert shape.flops == seen * shape.heads * (2 * shape.head_dim + 2 * shape.head_dim)
    inputs = make_inputs(shape, CPU, seed=0)
    keys = [x for b in range(shape.batch) for x in inputs.keys_of(b)]
    assert shape.kv_bytes == sum(x.numel() for x in keys) * inputs.k.element_size()
    out = Ours().prepare(inputs)()
    assert shape.io_bytes == shape.kv_bytes + sum(x.numel() * x.element_size() for x in (inputs.q, out))


@pytest.mark.parametrize(
    ("name", "milliseconds", "rate"),
    [  # measured on an H200, by other programs
        ("dense-hd128-full-32k-h40", 32.3, 680),
        ("dense-hd128-full-75600-h12", 52.0, 675),
        ("decode-b1-8k", 0.0175, 1.9),
        ("decode-b4-4k", 0.0257, 2.6),
        ("decode-b1-32k", 0.042, 3.2),
        ("decode-b8-32k", 0.255, 4.2),
        ("decode-b32-8k", 0.255, 4.2),
        ("decode-b64-4k", 0.255, 4.2),
        ("decode-b128-2k", 0.323, 3.3),
        ("decode-b64-32k", 1.96, 4.4),
        ("decode-group8-b16-16k", 0.2565, 4.2),
        ("decode-q4-b16-16k", 0.2565, 4.2),
        ("decode-hd64-b64-8k", 0.138, 2.9),
    ],
)
def test_rates_are_those_others_found(name, milliseconds, rate):
    result = RowResult(BY_NAME[name], BY_NAME[name].shape, times={OURS: Time(milliseconds * 1e3, 0.0, 0.0)})
    assert result.rate(OURS) == pytest.approx(rate, rel=0.025)


def test_every_row_and_target_of_the_issue_is_there():
    fa3 = {
        row.name: target.at_least
        for row in rows.ROWS
        for target in row.targets
        if target.against == "FA3" and row.skip is None and row.shape.fp8 == "none"
    }
    dense = [
        f"dense-hd{d}-{mask}-{size}"
        for d in (64, 128, 256)
        for mask in ("full", "causal")
        for size in ("2k-b8", "8k-b2", "16k-b1", "32k-b1")
    ]
    dense += ["dense-hd128-full-32k-h40", "dense-hd128-full-75600-h12"]
    others = {
        "chunk-8k-over-128k": 1.0,
        "prefill-page16-4k-over-32k": 1.03,
        "prefill-page64-4k-over-32k": 1.10,
        "prefill-page128-4k-over-32k": 1.03,
        "varlen-64x128-32k": 1.05,
        "decode-b1-8k": 1.25,
        "decode-b4-4k": 1.2,
        "decode-b1-32k": 1.1,
        "decode-hd64-b64-8k": 1.2,
        "decode-b128-2k": 1.2,
        "mixed-2k-and-63-decodes": 1.05,
    }
    matched = ["b8-32k", "b32-8k", "b64-4k", "b64-32k", "b256-512-32k"]
    matched += [f"group{n}-b16-16k" for n in (1, 4, 8, 16)] + [f"q{n}-b16-16k" for n in (2, 4, 8)]
    assert fa3 == dict.fromkeys(dense, 1.0) | others | {f"decode-{name}": 0.99 for name in matched}
    best = {row.name for row in rows.ROWS if Target(BEST, 0.98) in row.targets}
    own = {row.name for row in rows.ROWS if Target(OWN_CONTIGUOUS, 0.98) in row.targets}
    assert best == set(dense) and own == {name for name in others if name.startswith("prefill")}
    assert {(one.rows, str(one.target)) for one in rows.AVERAGES} == {
        ("dense-*", "FA3 1.04"),
        ("dense-*", "best 1.00"),
        ("dense-hd64-*", "FA3 1.10"),
    }


def test_dense_rows_keep_the_model_width_and_the_tokens():
    for row in rows.ROWS[:24]:
        shape = row.shape
        assert shape.heads * shape.head_dim == 2048 and shape.heads == shape.heads_k
        assert sum(shape.q_lens) == (32768 if shape.q_lens == (32768,) else 16384)


@pytest.mark.parametrize(("count", "shortest", "longest"), [(64, 128, 32768), (256, 512, 32768)])
def test_log_uniform_lengths(count, shortest, longest):
    lens = rows.log_uniform(count, shortest, longest, seed=3)
    assert lens == rows.log_uniform(count, shortest, longest, seed=3) != rows.log_uniform(count, shortest, longest, 4)
    assert shortest <= min(lens) and max(lens) <= longest
    middle = math.sqrt(shortest * longest)  # half of them are shorter
    assert abs(sum(n < middle for n in lens) - count / 2) < 3 * math.sqrt(count / 4)


def test_scaling_shortens_sequences_and_leaves_decode_steps_alone():
    small = BY_NAME["mixed-2k-and-63-decodes"].shape.scaled(1 / 64)
    assert small.q_lens == (32, *[1] * 63) and small.k_lens == (128,) * 64
    assert BY_NAME["decode-q4-b16-16k"].shape.scaled(1e-6).k_lens == (16,) * 16


@pytest.mark.parametrize(
    ("change", "argument"),
    [({"q_lens": (41, 40)}, "q_lens"), ({"k_lens": (41, 40)}, "layout"), ({"page_size": 16}, "page_size")],
)
def test_a_shape_that_does_not_fit_together_is_refused(change, argument):
    with pytest.raises(ValueError, match=argument):
        replace(SHAPES["full"], **change)


def test_pages_are_used_once_and_in_no_order():
    shape = Shape((1,) * 3, (100, 33, 64), 2, 1, 64, causal=True, layout="paged", page_size=16)
    table = make_inputs(shape, CPU, seed=0).block_table
    used = [*table[0, :7].tolist(), *table[1, :3].tolist(), *table[2, :4].tolist()]
    assert sorted(used) == list(range(14)) != used


# What is asked of the times.


def test_ratio_is_the_peers_time_over_ours():
    times = {OURS: 50.0, "FA3": 60.0, "FA4": 45.0, "cuDNN": 70.0, "SDPA": 1.0, OWN_CONTIGUOUS: 10.0}
    assert [ratio(times, name) for name in ("FA3", BEST, OWN_CONTIGUOUS)] == [1.2, 0.9, 0.2]
    assert ratio({OURS: 50.0}, BEST) is None and ratio({"FA3": 50.0}, "FA3") is None
    found = judge((Target("FA3", 1.2), Target(BEST, 0.98), Target("none", 1.0)), times)
    assert [one.met for one in found] == [True, False, None]
    assert verdict(found) == "below best 0.98: 0.900, no none"
    assert verdict(found[:1]) == "meets"


@pytest.mark.parametrize("ran", [set(some) for n in range(4) for some in itertools.combinations(BEST_OF, n)])
@pytest.mark.parametrize("lacking", [set(), {"FA4"}, {"FA4", "cuDNN"}, set(BEST_OF)])
def test_the_best_is_judged_where_all_ran_that_can(ran, lacking):
    """Slow ones that ran are not the best of all."""
    times = {OURS: 50.0} | dict.fromkeys(ran, 60.0)
    (found,) = judge((Target(BEST, 0.98),), times, lacking)
    absent = [name for name in BEST_OF if name not in ran | lacking]
    assert found.without == tuple(absent)
    if absent or not ran:
        assert found.ratio is None and found.met is None
        assert verdict([found]) == (f"best not judged without {', '.join(absent)}" if absent else "no best")
    else:
        assert found.ratio == 1.2 and verdict([found]) == "meets"
    average = judge_average(Average("a", Target(BEST, 0.98)), {"a": times}, {"a": lacking})
    assert (average.ratio, average.met) == (found.ratio, found.met)
    assert average.without == (found.without if ran else ())
    if absent:
        assert average_line(average).endswith(
            ", needs 0.98: not judged, as only 0 of 1 rows were measured"
            + (f" beside {', '.join(absent)}" if ran else "")
        )


def test_averages_are_judged_where_all_rows_were_measured():
    average = Average("a-*", Target("FA3", 1.1))
    times = {"a-1": {OURS: 10.0, "FA3": 10.0}, "a-2": {OURS: 10.0, "FA3": 12.5}, "b": {OURS: 1.0, "FA3": 9.0}}
    found = judge_average(average, times)
    assert (found.ratio, found.met, found.measured, found.rows) == (1.125, True, 2, 2)
    assert average_line(found) == "a-* on average: 1.125 x FA3, needs 1.10: meets"
    partly = judge_average(average, times | {"a-3": {OURS: 4.0}})
    assert (partly.ratio, partly.met) == (1.125, None)
    assert "not judged, as only 2 of 3 rows were measured" in average_line(partly)
    assert judge_average(average, {"a-1": {}}).ratio is None


def full_run(**slower):
    """A run of all rows on a GPU, where peers take `slower` times our 100 us; FA4 and cuDNN have no pages."""
    ceilings = Ceilings(copy=3.0, copied_bytes=1 << 30, product=800.0, side=8192)
    place = {"GPU": "H", "date": "2026-11-24 10:00 UTC", "LiteAttention": "0"}
    run = Run(place, "cuda", 1.0, 20, ceilings, dict.fromkeys(slower, "one"), {})
    for row in rows.ROWS:
        times = {OURS: Time(100.0, 99.0, 101.0)}
        absent = dict.fromkeys(slower.keys() & {"FA4", "cuDNN"}, "no paged KV") if row.shape.layout == "paged" else {}
        times |= {name: Time(100 * x, 0.0, 0.0) for name, x in slower.items() if name not in absent}
        run.rows.append(RowResult(row, row.shape, times=times, absent=absent, lacking=set(absent)))
    return run


def test_the_table_of_a_run_of_everything():
    run = full_run(FA3=1.045, FA4=0.99, cuDNN=1.2)
    assert [(one.ratio, one.met) for one in run.averages()] == [
        (pytest.approx(1.045), True),
        (pytest.approx(0.99), False),
        (pytest.approx(1.045), False),
    ]
    table = {one.row.name: dict(zip(header(run), cells(run, one), strict=True)) for one in run.rows}
    assert table["decode-b64-4k"]["rate"] == "10.74 TB/s"
    assert table["decode-b64-4k"]["of ceiling"] == "358%"
    assert table["decode-b64-4k"]["FA3"] == "1.045" and table["decode-b64-4k"]["FA4"] == "no paged KV"
    assert table["decode-b64-4k"]["verdict"] == "meets"
    assert table["decode-b1-8k"]["verdict"] == "below FA3 1.25: 1.045"
    assert table["dense-hd64-full-2k-b8"]["verdict"] == "meets"
    assert table["prefill-page16-4k-over-32k"]["verdict"] == f"no {OWN_CONTIGUOUS}"
    text = markdown(run, "rates.png")
    assert "- dense-* on average: 0.990 x best, needs 1.00: below\n" in text and "![" in text
    lines = [line for line in text.splitlines() if line.startswith("| d")]
    assert {line.count("|") for line in lines[1:]} == {len(header(run)) + 1}


def test_the_table_of_a_run_beside_one_of_the_peers():
    run = full_run(FA3=1.045)
    table = {one.row.name: dict(zip(header(run), cells(run, one), strict=True)) for one in run.rows}
    assert table["dense-hd64-full-2k-b8"]["FA3"] == "1.045"
    assert table["dense-hd64-full-2k-b8"]["verdict"] == "best not judged without FA4, cuDNN"
    assert (
        "\n- dense-* on average: best, needs 1.00: not judged, as only 0 of 26 rows were measured beside FA4, cuDNN\n"
        in (markdown(run, None))
    )
    assert [one.met for one in full_run().averages()] == []  # without any peer there is nothing to tell


class DensePeer(SDPA):
    """One of the best three, that lacks a row, or fails at it."""

    def __init__(self, name, lack=None, fails=False):
        self.name, self.lack, self.fails = name, lack, fails

    def lacks(self, shape):
        return self.lack

    def prepare(self, inputs):
        if self.fails:
            raise RuntimeError("no memory")
        return super().prepare(inputs)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([DensePeer("FA4"), DensePeer("cuDNN")], "meets"),
        ([DensePeer("FA4", lack="no such thing"), DensePeer("cuDNN")], "meets"),
        ([DensePeer("FA4", fails=True), DensePeer("cuDNN")], "best not judged without FA4"),
        ([DensePeer("cuDNN")], "best not judged without FA4"),
    ],
)
def test_a_peer_that_fails_may_have_been_the_best(others, said):
    row = rows.Row("dense-test", SHAPES["full"], (Target("FA3", 1.0), Target(BEST, 1.0)))
    clock = lambda call: (call(), 10.0)[1]  # noqa: E731
    measurement = measure.Measurement(CPU, [DensePeer("FA3"), *others], 2, clock, lambda text: None)
    result = measurement.measure(row, row.shape)
    assert result.status == "measured" and verdict(result.verdicts()) == said


def test_targets_do_not_judge_other_sizes():
    row = BY_NAME["decode-b1-8k"]
    small = RowResult(row, row.shape.scaled(0.5), times={OURS: Time(1.0, 1.0, 1.0), "FA3": Time(9.0, 9.0, 9.0)})
    assert small.verdicts() == [] and verdict(small.verdicts()) == "not at full size"


def test_json_has_no_nan(tmp_path):
    run = full_run(FA3=1.0)
    run.rows[0].agreements.append(check.Agreement("FA3", math.nan, 0.1, math.inf, 0.0))
    run.write(tmp_path / "x.json")
    (written,) = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)["rows"][0]["agreements"]
    assert (written["difference"], written["error"], written["right"]) == ("nan", "inf", False)


# The contenders.


def test_contenders_agree_with_the_definition(shape):
    inputs = make_inputs(shape, CPU, seed=1)
    found = [one.prepare(inputs)() for one in (Ours(), SDPA())]
    for b in range(shape.batch):
        k, v = inputs.keys_of(b)
        expected, _ = oracle.attention(inputs.queries_of(b), k, v, scale=1 / 8, causal=shape.causal, window=(-1, -1))
        for out in found:
            part = out.reshape(-1, shape.heads, 64)[inputs.rows_of(b)].double()
            torch.testing.assert_close(part, expected, rtol=0.02, atol=0.02)
    assert check.against_peer("SDPA", *found, check.samples(inputs)).right


FA3_FWD = """
    q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k
    page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale
    is_causal window_size_left window_size_right softcap is_rotary_interleaved scheduler_metadata num_splits pack_gqa
    sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k
"""
FA3_PLAN = """
    batch_size max_seqlen_q max_seqlen_k num_heads num_heads_k headdim headdim_v qkv_dtype seqused_k cu_seqlens_q
    cu_seqlens_k cu_seqlens_k_new seqused_q leftpad_k page_size max_seqlen_k_new is_causal window_size_left
    window_size_right has_softcap num_splits pack_gqa sm_margin
"""
FA3_USED = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True}
FA3_USED |= {"num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0}
FA3_PLAN_USED = {"max_seqlen_k_new": 0, "window_size_left": -1, "window_size_right": -1, "has_softcap": False}
FA3_PLAN_USED |= {"num_splits": 0, "sm_margin": 0}


def test_fa3_is_given_its_arguments_in_their_order(shape, monkeypatch):
    """By the names of its C++ interface, which a stand-in computes by."""
    plans, dtype = [], torch.bfloat16 if shape.fp8 == "none" else torch.float8_e4m3fn
    has_descales = {f"{name}_descale" for name in shape.fp8 if shape.fp8 != "none"}

    def plan(*values):
        given = dict(zip(FA3_PLAN.split(), values, strict=True))
        used = {key: value for key, value in given.items() if value is not None}
        assert {key: used.pop(key) for key in FA3_PLAN_USED} == FA3_PLAN_USED
        assert used.pop("headdim_v") == used["headdim"] and used.pop("qkv_dtype") == dtype
        plans.append(used)
        return torch.tensor([len(plans)])

    def fwd(*values):
        given = {key: value for key, value in zip(FA3_FWD.split(), values, strict=True) if value is not None}
        assert {key: given.pop(key) for key in FA3_USED} == FA3_USED
        metadata, paged, has_lengths = (
            given.pop("scheduler_metadata", None),
            "page_table" in given,
            "seqused_k" in given,
        )
        assert (metadata is not None) == shape.planned
        if shape.planned:
            used = plans[int(metadata) - 1]
            for key in ("max_seqlen_q", "max_seqlen_k", "is_causal"):
                assert used[key] == given[key]
            assert torch.equal(used["seqused_k"], given["seqused_k"])
            assert torch.equal(used["cu_seqlens_q"], given["cu_seqlens_q"])
            assert (used["batch_size"], used["page_size"]) == (len(given["seqused_k"]), given["k"].shape[1])
            assert (used["num_heads"], used["headdim"]) == tuple(given["q"].shape[-2:])
            assert used["num_heads_k"] == given["k"].shape[-2]
        q, k, v, out = (given.pop(key) for key in ("q", "k", "v", "out"))
        assert q.dtype == k.dtype == v.dtype == dtype
        descales = {name: given.pop(name) for name in ("q_descale", "k_descale", "v_descale") if name in given}
        assert set(descales) == has_descales
        starts = [given.pop("cu_seqlens_q"), given.pop("cu_seqlens_k", None)]
        lite_attention.flash_attn_varlen_func(
            q, k, v, *starts, given.pop("max_seqlen_q"), given.pop("max_seqlen_k"),
            causal=given.pop("is_causal"), softmax_scale=given.pop("softmax_scale"),
            seqused_k=given.pop("seqused_k", None), block_table=given.pop("page_table", None), out=out, **descales,
        )  # fmt: skip
        assert not given and (starts[1] is None) == paged == has_lengths
        return [out, None, None, None]

    ops = types.SimpleNamespace(fwd=fwd, get_scheduler_metadata=plan)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", ops, raising=False)
    inputs = make_inputs(shape, CPU, seed=2)
    fa3 = FA3(None)
    assert fa3.lacks(shape) is None
    ours, theirs, loosened = Ours().prepare(inputs)(), fa3.prepare(inputs)(), check.LOOSENED if has_descales else 1.0
    agreement = check.against_peer("FA3", ours, theirs, check.samples(inputs), loosened)
    assert agreement.right, agreement


def test_fp8_is_what_it_says_and_only_peers_over_fp8_are_held_loosely():
    inputs = make_inputs(SHAPES["fp8-decode"], CPU, seed=0)
    assert inputs.q.dtype == torch.bfloat16 and inputs.k.dtype == inputs.v.dtype == torch.float8_e4m3fn
    assert {name: tuple(x.shape) for name, x in inputs.descales.items()} == {"k_descale": (2, 2), "v_descale": (2, 2)}
    k, _ = inputs.keys_of(0)
    page = inputs.k[inputs.block_table[0, 1]].float() * inputs.descales["k_descale"][0][:, None]
    assert torch.equal(k[16:32].float(), page)  # exactly, though it is bfloat16
    out = Ours().prepare(inputs)()
    assert check.against_reference(out, check.samples(inputs)).right
    noise = 1 + 0.03 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    wrong = (out.float() * noise).bfloat16()
    assert not check.against_peer("peer", out, wrong, check.samples(inputs)).right
    assert check.against_peer("peer", out, wrong, check.samples(inputs), check.LOOSENED).right
    assert not check.against_peer("peer", out, 2 * out, check.samples(inputs), check.LOOSENED).right


def test_fa4_is_called_by_its_names(shape, monkeypatch):
    def forward(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal):
        if cu_seqlens_q is None:
            return lite_attention.flash_attn_func(q, k, v, causal=causal), None
        lens = (max_seqlen_q, max_seqlen_k)
        return lite_attention.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *lens, causal=causal), None

    modules = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")}
    modules["flash_attn"].cute = modules["flash_attn.cute"]
    modules["flash_attn.cute"].interface = modules["flash_attn.cute.interface"]
    modules["flash_attn.cute.interface"]._flash_attn_fwd = forward
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    fa4, inputs = FA4(), make_inputs(shape, CPU, seed=2)
    assert fa4.available() is None
    if shape.fp8 != "none":
        assert fa4.lacks(shape) == "no FP8 on Hopper"
    elif shape.layout == "paged":
        assert fa4.lacks(shape) == "no paged KV"
    else:
        assert torch.equal(fa4.prepare(inputs)(), Ours().prepare(inputs)())


def test_cudnn_computes_what_is_dense(shape, monkeypatch):
    monkeypatch.setattr(
        "lite_attention.bench.peer_torch.SDPBackend.CUDNN_ATTENTION", torch.nn.attention.SDPBackend.MATH
    )
    cudnn, inputs = CuDNN(), make_inputs(shape, CPU, seed=2)
    if shape.fp8 != "none":
        assert cudnn.lacks(shape) == "no FP8 through PyTorch"
    elif shape.layout == "dense":
        out = cudnn.prepare(inputs)()
        assert out.shape == inputs.q.shape
        assert check.against_peer("cuDNN", Ours().prepare(inputs)(), out, check.samples(inputs)).right
    else:
        assert cudnn.lacks(shape) in ("no paged KV", "no packed sequences")


# Which peers there are.


def test_fa3_is_found_in_a_vllm_that_is_not_imported(tmp_path, monkeypatch):
    for folder, file in (("other", None), ("site", LIBRARY)):
        package = tmp_path / folder / "vllm"
        (package / LIBRARY).parent.mkdir(parents=True)
        (package / "__init__.py").write_text("raise AssertionError('vLLM was imported')\n")
        if file:
            (package / file).write_bytes(b"no library")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "other")
    assert find_fa3() is None and "--fa3 PATH" in FA3(find_fa3()).available()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_fa3() == tmp_path / "site" / "vllm" / LIBRARY
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "does not load" in FA3(find_fa3()).available()


def test_fa3_is_told_by_its_bytes_and_the_vllm_around_it(tmp_path):
    digest = hashlib.sha256(b"no library").hexdigest()[:16]
    library = tmp_path / "site" / "vllm" / LIBRARY
    alone = tmp_path / LIBRARY.name
    library.parent.mkdir(parents=True)
    for path in (library, alone):
        path.write_bytes(b"no library")
        assert FA3(path).identity() == f"{path}, sha256 {digest}"  # no dist-info
    for folder, name, version in (("vllm-0.26.0", "vllm", "0.26.0+cu130"), ("vllm_more-9.dist-info", "vllm-more", "9")):
        place = tmp_path / "site" / f"{folder.removesuffix('.dist-info')}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert FA3(library).identity() == f"{library}, sha256 {digest}, of vLLM 0.26.0+cu130"
    assert FA3(alone).identity() == f"{alone}, sha256 {digest}"
    elsewhere = library.parents[1] / "other" / LIBRARY.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(b"another one")
    assert FA3(elsewhere).identity().endswith(", of vLLM 0.26.0+cu130") and digest not in FA3(elsewhere).identity()


@pytest.fixture
def without_peers(monkeypatch):
    monkeypatch.setattr(peers, "find_fa3", lambda: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # which makes its import an ImportError
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)


def test_peers_that_are_not_there_are_named_with_the_reason(without_peers):
    found, missing = peers.find_peers("cuda", None, None)
    assert found == []
    assert list(missing) == ["FA3", "FA4", "cuDNN"]
    for name, words in zip(missing, ("--fa3 PATH", "cannot be imported", "no cuDNN"), strict=True):
        assert words in missing[name]


@pytest.mark.parametrize(
    ("asked", "fa3", "words"),
    [
        ("fa3", None, "--peers: FA3 can't be used: no installed vLLM"),
        ("fa4,cudnn", None, "--peers: FA4 can't be used"),
        ("fa5", None, "--peers: got 'fa5'; on cuda it can be none, or some of fa3,fa4,cudnn"),
        (None, "nowhere.so", "--fa3: got nowhere.so, where there is no file"),
        ("cudnn", "nowhere.so", "--fa3: got nowhere.so, but FA3 is not among the peers: cudnn"),
    ],
)
def test_a_peer_that_was_asked_for_must_be_there(without_peers, asked, fa3, words):
    with pytest.raises(SystemExit) as stopped:
        peers.find_peers("cuda", asked, fa3 and peers.Path(fa3))
    assert words in str(stopped.value)


def test_no_peer_may_be_asked_for(without_peers):
    assert peers.find_peers("cuda", "none", None) == ([], {})


# Turns.


def test_contenders_take_turns_and_inputs_go_round():
    log = []
    calls = {name: [lambda name=name, i=i: log.append((name, i)) for i in range(2)] for name in "abc"}
    ticks = itertools.count()
    found = timing.interleaved(calls, 4, lambda call: (call(), float(next(ticks)))[1])
    assert log == [(name, i % 2) for i, turn in enumerate(("abc", "bca", "cab", "abc")) for name in turn]
    assert found == {"a": [0.0, 5.0, 7.0, 9.0], "b": [1.0, 3.0, 8.0, 10.0], "c": [2.0, 4.0, 6.0, 11.0]}


def test_times_are_medians_of_one_call():
    samples = [10.0, 14.0, 12.0, 200.0]
    random.Random(0).shuffle(samples)
    assert Time.of(samples, calls=2) == Time(6.5, 5.0, 100.0)


@pytest.mark.parametrize("microseconds", [1.0, 17.0, 199.0, 2000.0, 9e4])
@pytest.mark.parametrize("inputs", [1, 3, 7, 16])
def test_a_graph_holds_every_input_equally_often(microseconds, inputs):
    count = timing.calls_in_graph(microseconds, inputs)
    assert count % inputs == 0 and count >= timing.LEAST_CALLS
    lasts = count * microseconds
    assert lasts >= timing.GRAPH_LASTS * 0.9 or count >= timing.MOST_CALLS
    assert lasts <= timing.GRAPH_LASTS * 1.1 + (timing.LEAST_CALLS + inputs) * microseconds


def test_decode_rows_are_timed_by_graphs_and_their_times_are_of_one_call(monkeypatch):
    """As on a GPU, with a clock that knows what a call costs."""
    clock, spent = [0.0], {OURS: 40.0, "FA3": 50.0, "FA4": 60.0}

    def graph_of(calls, count):
        if calls is contenders["FA4"]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: [calls[i % len(calls)]() for i in range(count)]

    def spend(name):
        return lambda: clock.__setitem__(0, clock[0] + spent[name])

    def time_of(call):
        start = clock[0]
        call()
        return clock[0] - start

    contenders = {name: [spend(name)] * 3 for name in spent}
    monkeypatch.setattr(measure, "graph_of", graph_of)
    measurement = measure.Measurement(torch.device("cuda"), [], 5, time_of, print)
    result = RowResult(BY_NAME["decode-b1-8k"], BY_NAME["decode-b1-8k"].shape)
    measurement._time(result, contenders, steps=1)
    assert result.microseconds == pytest.approx({OURS: 40.0, "FA3": 50.0})
    assert result.method == "graphs of 51 calls, over 3 inputs"
    assert result.absent["FA4"].startswith("raised RuntimeError in a graph: operation not permitted")


@pytest.mark.parametrize(
    ("microseconds", "method"), [(199.0, "graphs of 10 calls, over 1 inputs"), (201.0, "single calls")]
)
def test_short_calls_are_timed_by_graphs(microseconds, method, monkeypatch):
    monkeypatch.setattr(measure, "graph_of", lambda calls, count: calls[0])
    measurement = measure.Measurement(torch.device("cuda"), [], 5, lambda call: microseconds, print)
    result = RowResult(rows.ROWS[0], rows.ROWS[0].shape)
    measurement._time(result, {OURS: [lambda: None]}, steps=1)
    assert result.method == method


# What the checks catch.


def _skip_row(out):
    out[..., -1, 0, :] = math.nan


def _swap_heads(out):
    out[..., -1, :2, :] = out[..., -1, :2, :].flip(-2)


def _shrink_row(out):
    out[..., 0, 1, :] *= 0.9


def _all_a_little(out):
    out *= 1.02


BREAKS = (_skip_row, _swap_heads, _shrink_row, _all_a_little)


def break_ours(monkeypatch, broken, after=0):
    """LiteAttention with `broken` done to its results, after so many right ones."""
    calls = itertools.count()
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        right = getattr(lite_attention, name)

        def wrong(*args, right=right, **kwargs):
            out = right(*args, **kwargs)
            if next(calls) >= after:
                broken(out)
            return out

        monkeypatch.setattr(lite_attention, name, wrong)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("peer", ["sdpa", "none"])
@pytest.mark.parametrize("row", ["dense-hd64-causal-8k-b2", "decode-b4-4k"])
def test_a_wrong_result_fails_its_row_and_is_not_timed(row, peer, broken, tmp_path, monkeypatch, capsys):
    break_ours(monkeypatch, broken)
    status, found = bench(tmp_path, "--only", row, "--peers", peer)
    assert status == 1 and found[row]["status"] == "mismatch" and not found[row]["microseconds"]
    assert f"| mismatch: {found[row]['reason']} |" in (tmp_path / "README.md").read_text()
    assert f"WRONG: {row} (mismatch)" in capsys.readouterr().out
    assert not (tmp_path / "rates.png").exists()


def test_a_causal_mask_at_the_wrong_corner_is_wrong(tmp_path, monkeypatch):
    right = lite_attention.flash_attn_func

    def top_left(q, k, v, *, causal, out):
        return right(q, k[:, : q.shape[1]], v[:, : q.shape[1]], causal=causal, out=out)

    monkeypatch.setattr(lite_attention, "flash_attn_func", top_left)
    status, found = bench(tmp_path, "--only", "chunk-*", "--peers", "none")
    assert status == 1 and found["chunk-8k-over-128k"]["status"] == "mismatch"


def test_one_wrong_row_between_the_samples_is_found_by_a_peer():
    inputs = make_inputs(Shape((600,), (600,), 4, 4, 64, causal=False), CPU, seed=4)
    expected, out = check.samples(inputs), Ours().prepare(inputs)()
    theirs = out.clone()
    sampled = {i for one in expected for i in range(one.place.start, one.place.stop)}
    between = next(i for i in range(600) if i not in sampled)
    out[0, between, 2] *= 1.05
    assert check.against_reference(out, expected).right
    assert not check.against_peer("peer", out, theirs, expected).right


def test_a_result_that_changes_while_it_is_timed_is_wrong(tmp_path, monkeypatch):
    break_ours(monkeypatch, _shrink_row, after=3)
    status, found = bench(tmp_path, "--only", "decode-b4-4k", "--peers", "sdpa")
    assert status == 1 and found["decode-b4-4k"]["status"] == "mismatch"
    assert found["decode-b4-4k"]["reason"].startswith("against itself before timing")


@pytest.mark.parametrize("written", [0, 1])
def test_a_result_that_is_not_written_is_wrong(written, tmp_path, monkeypatch):
    """Even where it was written before: what a call is given to write to holds NaN."""
    right, calls = lite_attention.flash_attn_varlen_func, itertools.count()

    def idle(*args, out, **kwargs):
        return right(*args, out=out, **kwargs) if next(calls) < written else out

    monkeypatch.setattr(lite_attention, "flash_attn_varlen_func", idle)
    status, found = bench(tmp_path, "--only", "decode-b4-4k", "--peers", "none")
    assert status == 1 and found["decode-b4-4k"]["status"] == "mismatch"


@pytest.mark.parametrize("change", [{"difference": 0.11}, {"error": 0.011}, {"row_error": 0.032}])
def test_each_bound_counts_and_nan_is_beyond_it(change):
    within = check.Agreement("peer", difference=0.1, allowed=0.1, error=0.01, row_error=0.031)
    assert within.right and not replace(within, **change).right
    assert not replace(within, **dict.fromkeys(change, math.nan)).right


def test_comparison_is_by_the_largest_difference_and_by_norms():
    theirs = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[12.0, 5.0], [1.0, 0.0]]], dtype=torch.bfloat16)
    ours = theirs.clone()
    ours[0, 0, 1], ours[1, 1, 1] = 3.0, 0.5
    found = check.compare("peer", ours, theirs, 7.0)
    assert (found.difference, found.allowed, found.row_error) == (1.0, 7.0, 0.5)
    assert found.error == pytest.approx(math.sqrt(1.25 / (25 + 1 + 169 + 1)))


def test_samples_have_the_ends_and_the_extremes():
    lens = (40, 100, 3, 200, 50, 60)
    inputs = make_inputs(Shape(lens, lens, 2, 1, 64, causal=True, layout="packed"), CPU, seed=0)
    places = [one.place for one in check.samples(inputs)]
    starts = [sum(lens[:b]) for b in range(7)]
    for b in (0, 2, 3, 5):  # the first, the shortest, the longest, the last
        inside = [place for place in places if starts[b] <= place.start < starts[b + 1]]
        assert inside[0].start == starts[b] and inside[-1].stop == starts[b + 1]


# The whole of it.


def test_a_run_writes_numbers_table_and_picture(tmp_path, capsys):
    patterns = ("dense-hd128-*-2k-b8", "prefill-page16-*", "varlen-*", "decode-b1-8k", "mixed-*")
    only = [word for pattern in patterns for word in ("--only", pattern)]
    status, found = bench(tmp_path, *only, "--scale", "0.005", "--commit", "c0ffee")
    assert status == 0 and len(found) == 6
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["environment"]["commit"] == "c0ffee" and data["environment"]["torch"].startswith(torch.__version__)
    assert data["peers"] == {"SDPA": f"torch {torch.__version__}"}
    text = (tmp_path / "README.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "c0ffee" in text and f"copy of 64 MiB {data['ceilings']['copy_tb_s']:.2f} TB/s" in text
    shown = capsys.readouterr().out
    for name, row in found.items():
        times = {who: one["median"] for who, one in row["microseconds"].items()}
        assert set(times) == {OURS, "SDPA"} | ({OWN_CONTIGUOUS} if "prefill" in name else set())
        for who in times.keys() - {OURS}:
            assert f"{times[who] / times[OURS]:.3f}" in lines[name]
        work = row["flops"] if row["unit"] == "TFLOP/s" else row["kv_bytes"]
        assert row["rates"][OURS] == pytest.approx(work / times[OURS] / 1e6)
        assert {one["against"] for one in row["agreements"]} >= {"reference", "SDPA", "itself before timing"}
        assert all(one["right"] for one in row["agreements"]) and row["verdicts"] == []
        assert f"{name}: " in shown
    pixels = {tuple(round(255 * x) for x in pixel[:3]) for pixel in image.imread(tmp_path / "rates.png").reshape(-1, 4)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)} <= pixels  # ours, SDPA, own contiguous


def test_without_a_peer_results_are_still_checked_and_timed(tmp_path):
    status, found = bench(tmp_path, "--only", "decode-b4-4k", "--peers", "none")
    row = found["decode-b4-4k"]
    assert status == 0 and list(row["microseconds"]) == [OURS]
    assert [one["against"] for one in row["agreements"]] == ["reference", "itself before timing"]
    assert "- none" in (tmp_path / "README.md").read_text()


def test_what_is_not_built_is_shown_and_is_no_error(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("q: got head_dim 64; the kernels have 128")

    monkeypatch.setattr(lite_attention, "flash_attn_func", missing)
    status, found = bench(tmp_path, "--only", "dense-hd64-full-2k-b8", "--only", "decode-b4-4k")
    assert status == 0 and found["decode-b4-4k"]["status"] == "measured"
    assert found["dense-hd64-full-2k-b8"]["status"] == "not built"
    assert "| not built: q: got head_dim 64; the kernels have 128 |" in (tmp_path / "README.md").read_text()


def test_a_row_that_raises_fails_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(lite_attention, "flash_attn_func", broken)
    status, found = bench(tmp_path, "--only", "dense-hd64-full-2k-b8", "--only", "decode-b4-4k")
    assert status == 1 and found["decode-b4-4k"]["status"] == "measured"
    assert found["dense-hd64-full-2k-b8"]["reason"] == "RuntimeError: no memory"


def test_after_the_device_is_lost_rows_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Measurement, "lost", lambda self: "an illegal memory access")
    status, found = bench(tmp_path, "--only", "decode-b[14]-[48]k")
    assert status == 1
    assert [row["status"] for row in found.values()] == ["measured", "not run"]
    assert found["decode-b4-4k"]["reason"] == "the device was lost: an illegal memory access"


def test_a_peer_that_raises_is_left_out_with_the_reason(tmp_path, monkeypatch):
    def prepare(self, inputs):
        raise AssertionError("head_dim must be even")

    monkeypatch.setattr(SDPA, "prepare", prepare)
    status, found = bench(tmp_path, "--only", "decode-b4-4k")
    row = found["decode-b4-4k"]
    assert status == 0 and list(row["microseconds"]) == [OURS]
    assert row["absent"] == {"SDPA": "raised AssertionError: head_dim must be even"}
    assert "| raised AssertionError: head_dim must be even |" in (tmp_path / "README.md").read_text()


def test_a_peer_with_another_answer_fails_the_row(tmp_path, monkeypatch):
    right = SDPA.prepare
    monkeypatch.setattr(SDPA, "prepare", lambda self, inputs: lambda: right(self, inputs)() * 1.05)
    status, found = bench(tmp_path, "--only", "decode-b4-4k")
    assert status == 1 and found["decode-b4-4k"]["status"] == "mismatch"
    assert {one["against"]: one["right"] for one in found["decode-b4-4k"]["agreements"]} == {
        "reference": True,
        "SDPA": False,
    }


def test_list_needs_no_gpu(capsys):
    assert main(["bench", "--list", "--only", "chunk-*"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    shape = "b1 8192 over 131072 tokens, 32/8 heads, hd128, causal, dense"
    assert " ".join(line.split()) == f"chunk-8k-over-128k {shape} needs FA3 1.00"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing*"], "--only: got 'nothing*', which no row matches"),
        (["--device", "cpu", "--scale", "1"], "--scale: got 1; on cpu needs more than 0, at most 0.0625"),
        (["--device", "cpu", "--scale", "-1"], "--scale: got -1"),
        (["--device", "cpu", "--peers", "fa3"], "--peers: got 'fa3'; on cpu it can be none, or some of sdpa"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert words in str(stopped.value)


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU; needs a Hopper GPU, or --device cpu"):
        main(["bench"])


def test_without_the_extra_it_names_it(monkeypatch):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    with pytest.raises(SystemExit, match=r"rich, for .*: pip install 'lite-attention\[bench\]'"):
        main(["bench", "--device", "cpu"])


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lite_attention.bench", "--repetitions", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "--repetitions: got '0'; needs a whole number of 1 or more" in done.stderr


def test_the_commit_is_not_that_of_a_checkout_around_an_installed_copy(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True)

    package = tmp_path / "lite_attention"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(environment.lite_attention, "__file__", str(package / "__init__.py"))
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert environment.environment(CPU, None)["commit"].startswith("unknown")
    git("add", ".")
    git("commit", "-q", "-m", "y")
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert environment.environment(CPU, None)["commit"] == head.strip()
    (package / "__init__.py").write_text("changed")
    assert environment.environment(CPU, None)["commit"] == f"{head.strip()} with changes"

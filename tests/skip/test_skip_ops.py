"""The op of calls with lists under PyTorch's own checks and `torch.compile`."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import LAYOUTS, Case, assert_close
from skip_cases import SkipCall, SkipCase

from lite_attention import SkipList, skip_attention
from lite_attention.skip import op

OPS = ("skip_fwd", "skip_fwd_reference")
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) skip_list, Tensor threshold, "
    "Tensor? must_do, Tensor? must_skip, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
    "Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int window_left, "
    "int window_right, Tensor? sinks, int block_m, int block_n, bool update) -> ()"
)


def call_of(layout, **changes):
    case = Case(
        layout=layout,
        q_lens=(5, 5),
        k_lens=(29, 29),
        heads_k=2,
        group=2,
        head_dim=16,
        page_size=4,
        dtype=torch.float32,
        causal=True,
        window=(-1, -1),
        softcap=0.0,
        alibi="",
        sinks=True,
        scale=None,
        seed=0,
    )
    arguments = {
        "tile": (2, 3),
        "fill": "random",
        "thresholds": (-1.0,) * 4,
        "must_do": (((0, 2),), ((11, 12),)),
        "must_skip": (((3, 9),), ()),
    }
    return SkipCall(SkipCase(case=case, **(arguments | changes)))


def op_arguments(layout, monkeypatch):
    """What a public call hands to the op."""
    launched = []
    with monkeypatch.context() as patch:
        for name in OPS:
            patch.setattr(torch.ops.lite_attention, name, lambda *args: launched.append(args))
        call_of(layout).run("cpu")
    (arguments,) = launched
    return arguments


@pytest.fixture(autouse=True)
def start_anew():
    """PyTorch counts the graphs of a function, and has a limit."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("name", OPS)
def test_the_schema_is_the_kernels(name):
    schema = str(getattr(torch.ops.lite_attention, name).default._schema)
    assert schema == f"lite_attention::{name}{SCHEMA}"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout, monkeypatch):
    torch.library.opcheck(getattr(torch.ops.lite_attention, name).default, op_arguments(layout, monkeypatch))


def test_what_the_op_is_given(monkeypatch):
    arguments = dict(
        zip(
            (argument.name for argument in torch.ops.lite_attention.skip_fwd.default._schema.arguments),
            op_arguments("packed_seqused", monkeypatch),
            strict=True,
        )
    )
    call = call_of("packed_seqused")
    assert torch.equal(arguments["skip_list"], call.skip_list.bits)
    assert (arguments["block_m"], arguments["block_n"], arguments["update"]) == (2, 3, True)
    assert arguments["must_do"].tolist() == [[0b1], [0b1000]]
    assert arguments["must_skip"].tolist() == [[0b110], [0]]
    assert arguments["threshold"].tolist() == [-1.0] * 4


def test_where_both_are_asked_for_must_skip_loses(monkeypatch):
    call = call_of("dense", must_do=(((0, 4),), ()), must_skip=(((0, 29),), ((6, 9),)))
    launched = []
    monkeypatch.setattr(op, "launch", lambda problem, lists, backend: launched.append(lists))
    call.run("cpu")
    assert [mask.tolist() for mask in (launched[0].must_do, launched[0].must_skip)] == [
        [[0b11], [0]],
        [[0b1111111100], [0b100]],
    ]


@pytest.mark.parametrize("name", OPS)
def test_ops_check_values_themselves(name, monkeypatch):
    """So that a compiled caller, whose checks were traced without values, gets the same errors."""
    for position, bad, message in (
        (6, torch.tensor([-1.0, 0.0, 0.1, -1.0]), "threshold: got"),
        (11, torch.tensor([9, 90], dtype=torch.int32), "block_table: got .* room for the 90 keys"),
    ):
        arguments = list(op_arguments("paged", monkeypatch))
        arguments[position] = bad
        written = [arguments[i].clone() for i in (3, 5)]
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.lite_attention, name)(*arguments)
        assert torch.equal(arguments[3], written[0]) and torch.equal(arguments[5], written[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_functions_update_the_list_in_place(layout, backend):
    eager, compiled = call_of(layout), call_of(layout)
    compiled.function = torch.compile(compiled.function, fullgraph=True, backend="aot_eager")
    before = eager.skip_list.bits.clone()
    for _ in range(2):
        for x, y in zip(eager.run(backend), compiled.run(backend), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
        assert torch.equal(eager.skip_list.bits, compiled.skip_list.bits)
    assert not torch.equal(eager.skip_list.bits, before)


@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_a_threshold_changes_without_compiling_again(kind):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(skip_attention, fullgraph=True, backend=counting)
    q = 3 * torch.randn(1, 9, 2, 8)
    k = torch.randn(1, 60, 2, 8) * torch.linspace(0, 1, 60)[:, None, None]
    kept = []
    for threshold in (-0.5, -2.0, -6.0, -3.0, -9.0):
        lists = [SkipList.fresh(1, 2, 9, 60, tile=(4, 5)) for _ in range(2)]
        for function, skip_list in zip((skip_attention, compiled), lists, strict=True):
            function(q, k, k, skip_list, torch.tensor(threshold) if kind == "tensor" else threshold)
        assert torch.equal(lists[0].bits, lists[1].bits)
        kept.append(int(lists[0].visits().sum()))
    assert len(set(kept)) > 2
    # A Python float is a constant of the first graph; the second takes any.
    assert len(graphs) == (1 if kind == "tensor" else 2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++ for the CPU")
def test_inductor_keeps_the_steps_in_order():
    """Each step reads the list that the one before wrote, and a reset stands between two of them."""

    def steps(q, k, v, skip_list, threshold):
        first, _ = skip_attention(q, k, v, skip_list, threshold)
        second, _ = skip_attention(first + q, k, v, skip_list, threshold)
        kept = (
            skip_list.visits()
        )  # not bits.clone(), which Inductor of torch 2.13 drops after any op that writes in place
        skip_list.reset()
        third, lse = skip_attention(second + q, k, v, skip_list, threshold / 2)
        return first, second, third, lse, kept

    q, k, v = (3 * torch.randn(2, n, h, 16) for n, h in ((20, 4), (90, 2), (90, 2)))
    k *= torch.linspace(0, 1, 90)[:, None, None]
    lists = [SkipList.fresh(2, 4, 20, 90, tile=(8, 10)) for _ in range(2)]
    threshold = torch.tensor(-2.0)
    expected = steps(q, k, v, lists[0], threshold)
    got = torch.compile(steps, fullgraph=True)(q, k, v, lists[1], threshold)
    for x, y in zip(got, expected, strict=True):
        assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert torch.equal(lists[0].bits, lists[1].bits)
    assert not torch.equal(expected[4], lists[0].visits()) and not lists[0].visits().all()

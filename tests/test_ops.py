"""The custom ops under PyTorch's own checks, `torch.compile`, and fake tensors."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import LAYOUTS, Call, Case, assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lite_attention import (
    checks,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    ops,
    scheduler,
)

OPS = ("fwd", "fwd_reference")


def call_of(layout, alibi="heads", sinks=True, softcap=0.0, causal=True):
    return Call(
        Case(
            layout=layout,
            q_lens=(3, 3),
            k_lens=(9, 9),
            heads_k=2,
            group=2,
            head_dim=16,
            page_size=4,
            dtype=torch.float32,
            causal=causal,
            window=(-1, -1),
            softcap=softcap,
            alibi=alibi,
            sinks=sinks,
            scale=None,
            seed=0,
        )
    )


def op_arguments(layout, monkeypatch, **features):
    """What a public call hands to the op."""
    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(ops, "launch", lambda problem, backend: launched.append(problem))
        call_of(layout, **features).run("cpu")
    (problem,) = launched
    return tuple(getattr(problem, field) for field in checks.Problem.__dataclass_fields__)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout, monkeypatch):
    arguments = op_arguments(layout, monkeypatch)
    torch.library.opcheck(getattr(torch.ops.lite_attention, name).default, arguments)


@pytest.mark.parametrize("name", OPS)
def test_the_last_arguments_are_optional(name, monkeypatch):
    arguments = op_arguments("dense", monkeypatch, alibi="", sinks=False)
    op = getattr(torch.ops.lite_attention, name)
    op(*arguments)
    expected = arguments[3].clone()
    arguments[3].zero_()
    op(*arguments[:-6])  # softcap, alibi_slopes, sinks, num_splits, k_descale, v_descale
    assert torch.equal(arguments[3], expected)


@pytest.mark.parametrize("name", OPS)
def test_ops_check_values_themselves(name, monkeypatch):
    """So that a compiled caller, whose checks were traced without values, gets the same errors."""
    arguments = list(op_arguments("paged", monkeypatch))
    arguments[7] = torch.tensor([9, 90], dtype=torch.int32)
    before = arguments[3].clone()
    with pytest.raises(ValueError, match=r"block_table: got .* room for the 90 keys of sequence 1"):
        getattr(torch.ops.lite_attention, name)(*arguments)
    assert torch.equal(arguments[3], before)


class Recorder(TorchDispatchMode):
    """Keeps the arguments, by name, of our ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lite_attention":
            arguments = function._schema.arguments
            given = [*args, *(argument.default_value for argument in arguments[len(args) :])]
            self.calls.append(dict(zip((argument.name for argument in arguments), given, strict=True)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [{}, {"num_splits": 0}, {"num_splits": 1}, {"num_splits": 7}])
def test_num_splits_reaches_the_op(layout, given, backend):
    call = call_of(layout)
    with Recorder() as recorder:
        call.function(*call.args, **call.kwargs, **given, backend=backend)
    assert [arguments["num_splits"] for arguments in recorder.calls] == [given.get("num_splits", 0)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, False, False, False)),
        ({"num_splits": 1}, (1, False, False, False)),
        ({"page_size": 16}, (0, True, False, False)),
        ({"kv_dtype": torch.float8_e4m3fn}, (0, False, True, False)),
        ({"kv_dtype": torch.bfloat16}, (0, False, False, False)),
        ({"q_dtype": torch.bfloat16}, (0, False, False, False)),
        ({"q_dtype": torch.float8_e4m3fn}, (0, False, True, True)),
    ],
)
def test_a_plan_is_made_for_the_splits_pages_and_dtypes_of_the_calls(monkeypatch, given, expected):
    monkeypatch.setattr(scheduler, "scheduler_metadata_size", lambda *args: 8)
    with FakeTensorMode(), Recorder() as recorder:
        out = torch.empty(8, dtype=torch.int32, device="cuda")
        assert get_scheduler_metadata(4, 1, 100, 8, 2, 64, **given, out=out) is out
    (arguments,) = recorder.calls
    assert tuple(arguments[name] for name in ("num_splits", "paged", "fp8_kv", "fp8_q")) == expected
    assert (arguments["min_context"], arguments["whole"]) == (0, None)


def test_a_plan_knows_which_sequences_list_everything(monkeypatch):
    monkeypatch.setattr(scheduler, "scheduler_metadata_size", lambda *args: 8)
    with FakeTensorMode(), Recorder() as recorder:
        whole = torch.ones(4, dtype=torch.bool, device="cuda")
        out = torch.empty(8, dtype=torch.int32, device="cuda")
        get_scheduler_metadata(4, 1, 100, 8, 2, 64, min_context=4096, whole=whole, out=out)
    (arguments,) = recorder.calls
    assert arguments["min_context"] == 4096 and arguments["whole"] is whole


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_functions_give_the_same(layout, backend):
    call = call_of(layout)
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    q = call.args[0]
    outs = [torch.zeros(q.shape) for _ in range(2)]
    results = [
        function(*call.args, **call.kwargs, out=out, backend=backend)
        for function, out in zip((call.function, compiled), outs, strict=True)
    ]
    assert torch.equal(*outs), "out was not written"
    for eager, traced in zip(*results, strict=True):
        rows = (slice(None), slice(0, 6)) if eager.dim() == 2 else slice(0, 6)  # the rest of packed rows is padding
        assert torch.equal(eager[rows], traced[rows])


def test_one_graph_serves_every_length():
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v, starts, used, table, longest):
        return flash_attn_varlen_func(
            q, k, v, starts, None, q.shape[0], longest, causal=True, seqused_k=used, block_table=table, backend="cpu"
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    cache = torch.randn(8, 4, 2, 16)
    for rows, lengths in ((5, (5, 9)), (7, (12, 8)), (6, (9, 11))):
        q = torch.randn(rows, 4, 16)
        starts = torch.tensor([0, 2, rows], dtype=torch.int32)
        used = torch.tensor(lengths, dtype=torch.int32)
        table = torch.randperm(8, dtype=torch.int32).view(2, 4)
        arguments = (q, cache, cache, starts, used, table, max(lengths))
        assert torch.equal(compiled(*arguments), step(*arguments))
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++ for the CPU")
def test_inductor_keeps_the_append_before_the_attention():
    """The cache is written by PyTorch's ops, then read by ours, then written again: nothing may be reordered."""

    def steps(q, k_cache, v_cache, k, v, lengths, table):
        first = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table)
        second = flash_attn_with_kvcache(
            first, k_cache, v_cache, 2 * k, v, cache_seqlens=lengths + 1, block_table=table
        )
        return first, second

    def arguments():
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
        caches = (torch.randn(8, 4, 2, 16, generator=generator) for _ in range(2))
        table = torch.tensor([[7, 1, 3], [0, 4, 2]], dtype=torch.int32)
        return q, *caches, k, v, torch.tensor([3, 7], dtype=torch.int32), table

    eager, compiled = arguments(), arguments()
    expected, got = steps(*eager), torch.compile(steps, fullgraph=True)(*compiled)
    for x, y in zip((*expected, *eager), (*got, *compiled), strict=True):
        assert_close(y, x, rtol=1e-6, atol=1e-6)
    assert not torch.equal(eager[1], arguments()[1])


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_pass_through(name):
    with FakeTensorMode():
        q, k = torch.empty(2, 5, 4, 16), torch.empty(2, 9, 2, 16)
        out, lse = flash_attn_func(q, k, k, return_softmax_lse=True, backend="cpu" if name == "fwd" else "reference")
        assert out.shape == q.shape and lse.shape == (2, 4, 5)


def test_why_the_extension_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "EXTENSION", tmp_path / "_C.abi3.so")
    assert "not built" in ops._load_extension()
    ops.EXTENSION.write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"torch {torch.__version__} has no CUDA" in ops._load_extension()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "does not load" in ops._load_extension()

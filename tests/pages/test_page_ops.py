"""The ops of page lists under PyTorch's own checks, `torch.compile`, and fake tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from page_cases import HUGE, PageCase, Step
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention.pages import (
    PAGE,
    attend_pages,
    decode_pages,
    empty_sketch,
    op,
    select_pages,
    sketch_bytes,
    write_sketch,
)

BACKENDS = ("cpu", "reference")
CASE = PageCase(q_lens=(1, 2), k_lens=(300, 200), eps=0.3, newest=16, fp8=(), dtype=torch.bfloat16, sinks=True)
SCHEMAS = {
    "page_sketch": "(Tensor k_cache, Tensor(a!) sketch, Tensor pages) -> ()",
    "page_select": "(Tensor q, Tensor sketch, Tensor(a!) bits, Tensor(b!) indices, Tensor(c!) counts, "
    "Tensor(d!) left_out, Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, Tensor? k_descale, "
    "SymInt max_seqlen_q, float softmax_scale, float eps, int min_context, int newest, Tensor? whole) -> ()",
    "page_attend": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) lse, Tensor indices, "
    "Tensor counts, Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, SymInt max_seqlen_q, "
    "float softmax_scale, Tensor? sinks, Tensor? k_descale, Tensor? v_descale, int num_splits=0) -> ()",
    "page_decode": "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) sketch, Tensor? filled, Tensor(b!) out, "
    "Tensor(c!) lse, Tensor(d!) bits, Tensor(e!) indices, Tensor(f!) counts, Tensor(g!) left_out, "
    "Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, Tensor? k_descale, Tensor? v_descale, "
    "SymInt max_seqlen_q, float softmax_scale, float eps, int min_context, int newest, Tensor? whole, Tensor? sinks, "
    "Tensor? scheduler_metadata, int num_splits=0) -> ()",
}


@pytest.fixture(autouse=True)
def start_anew():
    """PyTorch counts the graphs of a function, and has a limit."""
    torch._dynamo.reset()


def arguments_of(name, monkeypatch):
    """What a public call hands to the op; no FP8 and no NaN, which opcheck can't compare."""
    step = Step(replace(CASE, fp8=None))
    for x in (step.q, step.k_cache, step.v_cache):
        x.nan_to_num_()
    step.sketch.zero_()
    write_sketch(step.k_cache, step.sketch, torch.arange(step.sketch.shape[0], dtype=torch.int32))
    lists = step.select()
    lists.indices.masked_fill_(torch.arange(lists.max_blocks) >= lists.counts[..., None], 0)
    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(op, "_op", lambda *_: lambda *args: launched.append(args))
        if name == "page_sketch":
            write_sketch(step.k_cache, step.sketch, step.block_table[0, :18])
        elif name == "page_select":
            step.select()
            launched[0][3].zero_()
        elif name == "page_decode":
            step.decode(filled=step.block_table[0, :18], lists=lists, out=torch.zeros_like(step.q))
            launched[0][6].zero_()
        else:
            step.attend(lists, out=torch.zeros_like(step.q))
            launched[0][3].zero_(), launched[0][4].zero_()
    (arguments,) = launched
    return list(arguments)


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_is_the_kernels(name, suffix):
    schema = str(getattr(torch.ops.lite_attention, name + suffix).default._schema)
    assert schema == f"lite_attention::{name}{suffix}{SCHEMAS[name]}"


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, suffix, monkeypatch):
    torch.library.opcheck(getattr(torch.ops.lite_attention, name + suffix).default, arguments_of(name, monkeypatch))


def decode_step(step, q, k_cache, v_cache, sketch, pages, eps, backend):
    write_sketch(k_cache, sketch, pages, backend=backend)
    lists = select_pages(
        q, sketch, *step.batch_arguments, eps=eps, newest=16, k_descale=step.k_descale, backend=backend
    )
    out, lse = attend_pages(
        q,
        k_cache,
        v_cache,
        lists,
        *step.batch_arguments,
        k_descale=step.k_descale,
        v_descale=step.v_descale,
        backend=backend,
    )
    return lists.bits, lists.counts, out, lse


def decode_at_once(step, q, k_cache, v_cache, sketch, pages, eps, backend):
    out, lse, lists = decode_pages(
        q,
        k_cache,
        v_cache,
        sketch,
        *step.batch_arguments,
        eps=eps,
        filled=pages,
        newest=16,
        k_descale=step.k_descale,
        v_descale=step.v_descale,
        backend=backend,
    )
    return lists.bits, lists.counts, out, lse


@pytest.mark.parametrize("decode", [decode_step, decode_at_once])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_gives_the_same(backend, decode):
    step = Step(CASE)
    pages = step.block_table[:, :12].flatten()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(decode, fullgraph=True, backend=counting)
    listed = []
    for eps in (0.3, 0.2, 0.05):
        results = []
        for function in (decode, compiled):
            sketch = step.sketch.clone()
            sketch[pages.long()] = 255
            results.append([*function(step, step.q, step.k_cache, step.v_cache, sketch, pages, eps, backend), sketch])
        for eager, traced in zip(*results, strict=True):
            rows = slice(0, 3) if eager.shape[0] == 5 else slice(None)  # the rest of q is padding
            eager, traced = (x[:, :3] if x.shape[-1] == 5 else x[rows] for x in (eager, traced))
            assert torch.equal(eager, traced)
        listed.append(int(results[0][1].sum()))
    assert listed == sorted(set(listed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_pass_through(backend):
    with FakeTensorMode():
        k = torch.empty(8, PAGE, 2, 64)
        sketch = empty_sketch(k)
        write_sketch(k, sketch, torch.empty(3, dtype=torch.int32), backend=backend)
        starts, used, table = (torch.empty(n, dtype=torch.int32) for n in ((3,), (2,), (2, 40)))
        q = torch.empty(5, 4, 64)
        lists = select_pages(q, sketch, starts, used, table, 1, eps=0.1, backend=backend)
        out, lse = attend_pages(q, k, k, lists, starts, used, table, 1, backend=backend)
        at_once = decode_pages(q, k, k, sketch, starts, used, table, 1, eps=0.1, filled=starts, backend=backend)
        assert sketch.shape == (8, 2, sketch_bytes(64))
        for made in ((out, lse, lists), at_once):
            assert made[0].shape == q.shape and made[1].shape == (4, 5)
            shapes = [x.shape for x in (made[2].bits, made[2].indices, made[2].counts)]
            assert shapes == [(2, 2, 2), (2, 2, 40), (2, 2)]


@pytest.mark.parametrize("suffix", ["", "_reference"])
@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        ("page_sketch", 2, (3, HUGE), "pages: got 2147483647; needs at most"),
        ("page_select", 6, (0, 3, 2), "cu_seqlens_q: got .* needs starts that rise from 0"),
        ("page_select", 6, (0, 1, 9), "cu_seqlens_q: got an end at 9; needs at most the 5 rows"),
        ("page_select", 6, (0, 1, 4), "max_seqlen_q: got 2; needs at least the longest sequence of cu_seqlens_q, 3"),
        ("page_select", 7, (300, -1), "seqused_k: got -1 for sequence 1"),
        ("page_select", 7, (300, 400), "block_table: got .* needs room for the 400 keys of sequence 1"),
        ("page_select", 7, (300, 220), "block_table: got 2147483647 for page 13 of sequence 1"),
        ("page_attend", 8, (300, 400), "block_table: got .* needs room for the 400 keys of sequence 1"),
        ("page_attend", 8, (200, 200), "lists: got .* sequence 0"),
        ("page_attend", 6, ((2, 3), (4, 14)), "lists: got 14 pages for sequence 1, head 1; needs at most the 13 pages"),
        ("page_attend", 6, ((2, 3), (-1, 14)), "lists: got -1 pages for sequence 1, head 0"),
        ("page_decode", 4, (3, HUGE), "filled: got 2147483647; needs at most"),
        ("page_decode", 11, (0, 3, 2), "cu_seqlens_q: got .* needs starts that rise from 0"),
        ("page_decode", 11, (0, 1, 4), "max_seqlen_q: got 2; needs at least the longest sequence of cu_seqlens_q, 3"),
        ("page_decode", 12, (300, 400), "block_table: got .* needs room for the 400 keys of sequence 1"),
        ("page_decode", 12, (300, 220), "block_table: got 2147483647 for page 13 of sequence 1"),
    ],
)
def test_ops_check_values_themselves(name, suffix, argument, value, message, monkeypatch):
    """So that a compiled caller, whose checks were traced without values, gets the same errors."""
    arguments = arguments_of(name, monkeypatch)
    arguments[argument] = torch.tensor(value, dtype=torch.int32)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.lite_attention, name + suffix)(*arguments)
    for x, was in zip(arguments, before, strict=True):
        assert not isinstance(x, torch.Tensor) or torch.equal(x.float().nan_to_num(), was.float().nan_to_num())


@pytest.mark.parametrize("pages", [(0, 2, 2), (0, 3, 2), (-1, 0, 1), (0, 1, 19)])
@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_lists_are_of_pages_of_the_sequence_ascending(pages, suffix, monkeypatch):
    arguments = arguments_of("page_attend", monkeypatch)
    arguments[6] = torch.full((2, 2), 3, dtype=torch.int32)
    arguments[5] = torch.arange(arguments[5].shape[2], dtype=torch.int32).repeat(2, 2, 1)
    arguments[5][1, :, 2] = 12
    getattr(torch.ops.lite_attention, "page_attend" + suffix)(*arguments)
    arguments[5][0, 1, :3] = torch.tensor(pages, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"lists: got page .* of sequence 0, head 1; needs ascending pages below 19"):
        getattr(torch.ops.lite_attention, "page_attend" + suffix)(*arguments)


@pytest.mark.parametrize("suffix", ["", "_reference"])
def test_lists_of_several_query_tokens_have_all_new_pages(suffix, monkeypatch):
    arguments = arguments_of("page_attend", monkeypatch)
    arguments[8] = torch.tensor([300, 193], dtype=torch.int32)  # tokens at 191 and 192, in pages 11 and 12
    arguments[6] = torch.full((2, 2), 3, dtype=torch.int32)
    arguments[5][..., :3] = torch.tensor([0, 11, 12])
    getattr(torch.ops.lite_attention, "page_attend" + suffix)(*arguments)
    arguments[5][1, 1, 1] = 10
    message = "lists: got 1 pages from page 11 on for sequence 1, head 1; needs all 2, as the sequence has 2 query"
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.lite_attention, "page_attend" + suffix)(*arguments)

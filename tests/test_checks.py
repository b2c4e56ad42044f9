"""Every refusal: the error's type, the argument it names, what it was given, what works."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import (
    checks,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    hopper,
    ops,
)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(**changes):
    arguments = {"q": torch.zeros(2, 5, 4, 16), "k": torch.zeros(2, 9, 2, 16), "v": torch.zeros(2, 9, 2, 16)}
    return flash_attn_func(**(arguments | changes))


def packed(**changes):
    arguments = {
        "q": torch.zeros(7, 4, 16),
        "k": torch.zeros(12, 2, 16),
        "v": torch.zeros(12, 2, 16),
        "cu_seqlens_q": ints(0, 3, 7),
        "cu_seqlens_k": ints(0, 2, 12),
        "max_seqlen_q": 4,
        "max_seqlen_k": 10,
    }
    return flash_attn_varlen_func(**(arguments | changes))


def paged(**changes):
    arguments = {
        "k": torch.zeros(6, 4, 2, 16),
        "v": torch.zeros(6, 4, 2, 16),
        "cu_seqlens_k": None,
        "seqused_k": ints(8, 9),
        "block_table": ints([0, 1, 99], [2, 3, 4]),
    }
    return packed(**(arguments | changes))


def cache(**changes):
    arguments = {
        "q": torch.zeros(2, 5, 4, 16),
        "k_cache": torch.zeros(2, 9, 2, 16),
        "v_cache": torch.zeros(2, 9, 2, 16),
    }
    return flash_attn_with_kvcache(**(arguments | changes))


def strided(*shape):
    return torch.zeros(*shape, 2)[..., 0]


META = torch.zeros(2, 9, 2, 16, device="meta")

VALUE_ERRORS = [
    (dense, {"q": None}, "q: got NoneType; needs a tensor (batch, seqlen_q, num_heads, head_dim)"),
    (dense, {"q": torch.zeros(5, 4, 16)}, "q: got shape (5, 4, 16); needs (batch, seqlen_q, num_heads, head_dim)"),
    (
        dense,
        {"q": torch.zeros(2, 5, 4, 16).double()},
        "q: got torch.float64; needs torch.bfloat16 or torch.float16 or torch.float32 or torch.float8_e4m3fn",
    ),
    (dense, {"q": torch.zeros(2, 5, 0, 16)}, "q: got shape (2, 5, 0, 16); needs num_heads and head_dim of 1 or more"),
    (
        dense,
        {"q": strided(2, 5, 4, 16)},
        "q: got strides (640, 128, 32, 2); needs a head_dim of stride 1, as q.contiguous() has",
    ),
    (dense, {"k": torch.zeros(2, 9, 32)}, "k: got shape (2, 9, 32); needs (batch, seqlen_k, num_heads_k, head_dim)"),
    (
        dense,
        {"k": torch.zeros(2, 9, 2, 16).half()},
        "k: got torch.float16; needs the dtype of q, torch.float32, or torch.float8_e4m3fn",
    ),
    (dense, {"k": META}, "k: got a tensor on meta; needs one on the device of q, cpu"),
    (
        dense,
        {"k": strided(2, 9, 2, 16)},
        "k: got strides (576, 64, 32, 2); needs a head_dim of stride 1, as k.contiguous() has",
    ),
    (dense, {"v": torch.zeros(2, 9, 2, 8)}, "v: got shape (2, 9, 2, 8); needs the shape of k, (2, 9, 2, 16)"),
    (
        dense,
        {"v": torch.zeros(2, 9, 2, 16).bfloat16()},
        "v: got torch.bfloat16; needs the dtype of q, torch.float32, or torch.float8_e4m3fn",
    ),
    (dense, {"v": META}, "v: got a tensor on meta; needs one on the device of q, cpu"),
    (
        dense,
        {"v": strided(2, 9, 2, 16)},
        "v: got strides (576, 64, 32, 2); needs a head_dim of stride 1, as v.contiguous() has",
    ),
    (dense, {"q": torch.zeros(2, 5, 4, 8)}, "k: got a head_dim of 16; needs the head_dim of q, 8"),
    (dense, {"q": torch.zeros(2, 5, 3, 16)}, "k: got 2 heads; needs a num_heads_k that divides the num_heads of q, 3"),
    (dense, {"q": torch.zeros(3, 5, 4, 16)}, "k: got a batch of 2; needs the batch of q, 3"),
    (dense, {"softmax_scale": 0.0}, "softmax_scale: got 0.0; needs a positive number, or None for 1 / sqrt(head_dim)"),
    (
        dense,
        {"softmax_scale": float("nan")},
        "softmax_scale: got nan; needs a positive number, or None for 1 / sqrt(head_dim)",
    ),
    (dense, {"softmax_scale": "1"}, "softmax_scale: got 1; needs a positive number, or None for 1 / sqrt(head_dim)"),
    (dense, {"softcap": -1.0}, "softcap: got -1.0; needs a positive number, or 0.0 for none"),
    (dense, {"softcap": float("inf")}, "softcap: got inf; needs a positive number, or 0.0 for none"),
    *(
        (call, {"num_splits": given}, f"num_splits: got {given}; needs 0 or a positive int")
        for call in (dense, packed, paged, cache)
        for given in (-1, 1.0, True, None)
    ),
    (dense, {"window_size": 3}, "window_size: got 3; needs (left, right), two ints, where a negative one is unbounded"),
    (
        dense,
        {"window_size": (1, 2, 3)},
        "window_size: got (1, 2, 3); needs (left, right), two ints, where a negative one is unbounded",
    ),
    (
        dense,
        {"window_size": (1.0, 2)},
        "window_size: got (1.0, 2); needs (left, right), two ints, where a negative one is unbounded",
    ),
    (
        dense,
        {"window_size": None},
        "window_size: got None; needs (left, right), two ints, where a negative one is unbounded",
    ),
    (dense, {"alibi_slopes": torch.zeros(2)}, "alibi_slopes: got shape (2,); needs (4,) or (2, 4)"),
    (dense, {"alibi_slopes": torch.zeros(3, 4)}, "alibi_slopes: got shape (3, 4); needs (4,) or (2, 4)"),
    (dense, {"alibi_slopes": torch.zeros(4).half()}, "alibi_slopes: got torch.float16; needs torch.float32"),
    (
        dense,
        {"alibi_slopes": torch.zeros(4, device="meta")},
        "alibi_slopes: got a tensor on meta; needs one on the device of q, cpu",
    ),
    (dense, {"alibi_slopes": [0.0] * 4}, "alibi_slopes: got list; needs a float32 tensor"),
    (dense, {"sinks": torch.zeros(2, 4)}, "sinks: got shape (2, 4); needs (4,)"),
    (dense, {"sinks": torch.zeros(4).bfloat16()}, "sinks: got torch.bfloat16; needs torch.float32"),
    (dense, {"out": torch.zeros(2, 5, 4, 8)}, "out: got shape (2, 5, 4, 8); needs the shape of q, (2, 5, 4, 16)"),
    (dense, {"out": torch.zeros(2, 5, 4, 16).half()}, "out: got torch.float16; needs the dtype of q, torch.float32"),
    (
        dense,
        {"out": torch.zeros(2, 5, 4, 16, device="meta")},
        "out: got a tensor on meta; needs one on the device of q, cpu",
    ),
    (
        dense,
        {"out": strided(2, 5, 4, 16)},
        "out: got strides (640, 128, 32, 2); needs a head_dim of stride 1, as out.contiguous() has",
    ),
    (
        dense,
        {"out": torch.zeros(1, 5, 4, 16).expand(2, 5, 4, 16)},
        "out: got strides (0, 64, 16, 1); needs memory of its own for every element, as an expanded tensor hasn't",
    ),
    (dense, {"backend": "cuda"}, "backend: got 'cuda'; needs None or one of 'hopper', 'cpu', 'reference'"),
    (
        dense,
        {"backend": "hopper"},
        "backend: got 'hopper' for tensors on cpu; needs tensors on a Hopper GPU, or another backend",
    ),
    (packed, {"q": torch.zeros(1, 7, 4, 16)}, "q: got shape (1, 7, 4, 16); needs (total_q, num_heads, head_dim)"),
    (packed, {"k": torch.zeros(1, 12, 2, 16)}, "k: got shape (1, 12, 2, 16); needs (total_k, num_heads_k, head_dim)"),
    (packed, {"cu_seqlens_q": None}, "cu_seqlens_q: got None; needs an int32 tensor (batch + 1,)"),
    (packed, {"cu_seqlens_q": [0, 3, 7]}, "cu_seqlens_q: got list; needs an int32 tensor"),
    (packed, {"cu_seqlens_q": ints([0, 3, 7])}, "cu_seqlens_q: got shape (1, 3); needs (batch + 1)"),
    (packed, {"cu_seqlens_q": ints()}, "cu_seqlens_q: got no elements; needs batch + 1 of them"),
    (packed, {"cu_seqlens_q": ints(0, 3, 7).long()}, "cu_seqlens_q: got torch.int64; needs torch.int32"),
    (
        packed,
        {"cu_seqlens_q": ints(0, 1, 3, 1, 7, 1)[::2]},
        "cu_seqlens_q: got strides (2,); needs a last dimension of stride 1",
    ),
    (
        packed,
        {"cu_seqlens_q": ints(0, 3, 7).to("meta")},
        "cu_seqlens_q: got a tensor on meta; needs one on the device of q, cpu",
    ),
    (packed, {"cu_seqlens_q": ints(0, 4, 3)}, "cu_seqlens_q: got [0, 4, 3]; needs starts that rise from 0"),
    (packed, {"cu_seqlens_q": ints(-1, 3, 7)}, "cu_seqlens_q: got [-1, 3, 7]; needs starts that rise from 0"),
    (packed, {"cu_seqlens_q": ints(0, 4, 8)}, "cu_seqlens_q: got an end at 8; needs at most the 7 rows that there are"),
    (
        packed,
        {"cu_seqlens_k": None},
        "cu_seqlens_k: got None; needs a tensor, where k is packed and not paged by a block_table",
    ),
    (packed, {"cu_seqlens_k": ints(0, 2, 12, 12)}, "cu_seqlens_k: got shape (4,); needs (3)"),
    (packed, {"cu_seqlens_k": ints(0, 2, 12).long()}, "cu_seqlens_k: got torch.int64; needs torch.int32"),
    (packed, {"cu_seqlens_k": ints(0, 12, 2)}, "cu_seqlens_k: got [0, 12, 2]; needs starts that rise from 0"),
    (
        packed,
        {"cu_seqlens_k": ints(0, 3, 13)},
        "cu_seqlens_k: got an end at 13; needs at most the 12 rows that there are",
    ),
    (packed, {"max_seqlen_q": 3}, "max_seqlen_q: got 3; needs at least the longest sequence of cu_seqlens_q, 4"),
    (packed, {"max_seqlen_k": 9}, "max_seqlen_k: got 9; needs at least the longest sequence of cu_seqlens_k, 10"),
    (packed, {"max_seqlen_q": torch.tensor(4)}, "max_seqlen_q: got a tensor; needs a Python int"),
    (packed, {"max_seqlen_q": None}, "max_seqlen_q: got None; needs an int of 0 or more"),
    (packed, {"max_seqlen_k": -1}, "max_seqlen_k: got -1; needs an int of 0 or more"),
    (packed, {"max_seqlen_k": 10.0}, "max_seqlen_k: got 10.0; needs an int of 0 or more"),
    (packed, {"seqused_k": ints(1, 1, 1)}, "seqused_k: got shape (3,); needs (2)"),
    (packed, {"seqused_k": ints(1, 1).long()}, "seqused_k: got torch.int64; needs torch.int32"),
    (packed, {"seqused_k": ints(3, 1)}, "seqused_k: got 3 for sequence 0; needs at most the 2 keys that it has"),
    (packed, {"seqused_k": ints(1, -1)}, "seqused_k: got -1 for sequence 1; needs lengths of 0 or more"),
    (packed, {"scheduler_metadata": torch.zeros(4)}, "scheduler_metadata: got torch.float32; needs torch.int32"),
    (
        paged,
        {"k": torch.zeros(24, 2, 16)},
        "k: got shape (24, 2, 16); needs (num_blocks, page_size, num_heads_k, head_dim)",
    ),
    (
        paged,
        {"k": torch.zeros(6, 0, 2, 16), "v": torch.zeros(6, 0, 2, 16)},
        "k: got pages of 0 keys; needs a page_size of 1 or more",
    ),
    (paged, {"seqused_k": None}, "seqused_k: got None, with cu_seqlens_k=None; needs one of them, for the key lengths"),
    (paged, {"block_table": ints(0, 1, 2)}, "block_table: got shape (3,); needs (2, max_blocks)"),
    (paged, {"block_table": ints([0, 1, 2])}, "block_table: got shape (1, 3); needs (2, max_blocks)"),
    (paged, {"block_table": ints([0, 1, 2], [3, 4, 5]).long()}, "block_table: got torch.int64; needs torch.int32"),
    (
        paged,
        {"block_table": ints([0, 3], [1, 4], [2, 5]).T},
        "block_table: got strides (1, 2); needs a last dimension of stride 1",
    ),
    (
        paged,
        {"block_table": ints([0, 1], [2, 3])},
        "block_table: got 2 pages of 4 keys; needs room for the 9 keys of sequence 1 (seqused_k)",
    ),
    (paged, {"block_table": ints([0, 1, 2], [3, 6, 5])}, "block_table: got 6 for page 1 of sequence 1; needs 0 to 5"),
    (paged, {"block_table": ints([0, -1, 2], [3, 4, 5])}, "block_table: got -1 for page 1 of sequence 0; needs 0 to 5"),
    (paged, {"seqused_k": ints(9, 9)}, "block_table: got 99 for page 2 of sequence 0; needs 0 to 5"),
    (paged, {"seqused_k": ints(8, -9)}, "seqused_k: got -9 for sequence 1; needs lengths of 0 or more"),
    (paged, {"max_seqlen_k": 8}, "max_seqlen_k: got 8; needs at least the longest sequence of seqused_k, 9"),
    (
        cache,
        {"k_cache": torch.zeros(2, 9, 2, 8)},
        "v_cache: got shape (2, 9, 2, 16); needs the shape of k_cache, (2, 9, 2, 8)",
    ),
    (
        cache,
        {"k_cache": torch.zeros(3, 9, 2, 16), "v_cache": torch.zeros(3, 9, 2, 16)},
        "k_cache: got a batch of 3; needs the batch of q, 2",
    ),
    (
        cache,
        {"k_cache": torch.zeros(2, 9, 2, 16).half()},
        "k_cache: got torch.float16; needs the dtype of q, torch.float32, or torch.float8_e4m3fn",
    ),
    (cache, {"cache_seqlens": ints(1)}, "cache_seqlens: got shape (1,); needs (2)"),
    (cache, {"cache_seqlens": ints(1, -1)}, "cache_seqlens: got [1, -1]; needs lengths of 0 or more"),
]


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    VALUE_ERRORS,
    ids=[f"{call.__name__} {message[:60]}" for call, _, message in VALUE_ERRORS],
)
def test_value_errors(call, changes, message):
    with pytest.raises(ValueError) as error:
        call(**changes)
    assert str(error.value) == message


@pytest.mark.parametrize("call", [dense, packed, paged, cache])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_the_calls_above_work_unchanged(call, backend):
    assert call(backend=backend).shape[-2:] == (4, 16)


@pytest.mark.parametrize("call", [dense, packed, paged])
@pytest.mark.parametrize("dropout_p", [0.1, float("nan")])
def test_dropout(call, dropout_p):
    with pytest.raises(NotImplementedError, match=f"dropout_p: got {dropout_p}; .* has only dropout_p=0.0"):
        call(dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("call", "names"),
    [(dense, "q k v alibi_slopes sinks out"), (packed, "q k v"), (paged, "q k v"), (cache, "q k_cache v_cache k v")],
)
def test_inputs_that_require_grad(call, names):
    shapes = {"q": (7, 4, 16), "k": (12, 2, 16), "v": (12, 2, 16), "alibi_slopes": (4,), "sinks": (4,)}
    if call is paged:
        shapes |= {"k": (6, 4, 2, 16), "v": (6, 4, 2, 16)}
    elif call in (dense, cache):
        shapes |= dict.fromkeys(("k", "v", "k_cache", "v_cache"), (2, 9, 2, 16)) | dict.fromkeys(
            ("q", "out"), (2, 5, 4, 16)
        )
    for name in names.split():
        x = torch.zeros(shapes[name], requires_grad=True)
        with pytest.raises(NotImplementedError, match=f"{name}: got a tensor that requires grad; .* {name}.detach()"):
            call(**{name: x})
        if name not in ("k", "v") or call is not cache:
            with torch.no_grad():
                call(**{name: x})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_splits": -1}, "num_splits: got -1; needs 0 or a positive int"),
        (
            {"kv_dtype": torch.int8},
            "kv_dtype: got torch.int8; needs None, torch.float8_e4m3fn, or torch.bfloat16 or torch.float16 like q",
        ),
        (
            {"q_dtype": torch.float8_e5m2},
            "q_dtype: got torch.float8_e5m2; needs None, torch.float8_e4m3fn, or torch.bfloat16 or torch.float16",
        ),
        (
            {"q_dtype": torch.float8_e4m3fn, "kv_dtype": torch.bfloat16},
            "kv_dtype: got torch.bfloat16; needs None or torch.float8_e4m3fn beside a q_dtype of torch.float8_e4m3fn",
        ),
        ({"min_context": -1}, "min_context: got -1; needs an int of 0 or more, in tokens"),
        ({"min_context": 1.5}, "min_context: got 1.5; needs an int of 0 or more, in tokens"),
        ({"whole": [True]}, "whole: got list; needs None or a bool tensor (1,)"),
        ({"whole": torch.ones(2).bool()}, "whole: got torch.bool (2,); needs None or a bool tensor (1,)"),
        ({"whole": ints(1)}, "whole: got torch.int32 (1,); needs None or a bool tensor (1,)"),
        (
            {"whole": torch.ones(1, device="meta").bool(), "seqused_k": ints(7)},
            "whole: got a tensor on meta; needs one on cpu, as the other tensors are",
        ),
        ({"page_size": 0}, "page_size: got 0; needs a positive int, or None where there is no block_table"),
        ({"cu_seqlens_q": ints(0, 1)}, "total_q: got None; needs the number of rows of q, where cu_seqlens_q is given"),
    ],
)
def test_value_errors_of_the_plan(changes, message):
    with pytest.raises(ValueError) as error:
        get_scheduler_metadata(1, 1, 100, 8, 2, 64, **changes)
    assert str(error.value) == message


def for_hopper(head_dim=64, **changes):
    q, k = torch.zeros(2, 5, 4, head_dim).bfloat16(), torch.zeros(2, 9, 2, head_dim).bfloat16()
    return checks.prepare(q, k, k.clone(), **changes)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 192, 248, 256])
def test_head_dims_that_hopper_has(head_dim):
    hopper.check_supported(for_hopper(head_dim))


@pytest.mark.parametrize("head_dim", [4, 20, 100, 264, 512])
def test_head_dims_that_hopper_lacks(head_dim):
    message = f"q: got head_dim {head_dim}; the Hopper kernels have multiples of 8 up to 256. backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        hopper.check_supported(for_hopper(head_dim))


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 30.0},
        {"alibi_slopes": torch.ones(4)},
        {"alibi_slopes": torch.ones(2, 8)[:, :4]},
        {"sinks": torch.ones(4)},
        {"num_splits": 1},
    ],
)
def test_scores_that_hopper_has(changes):
    hopper.check_supported(for_hopper(**changes))


@pytest.mark.parametrize("name", ["alibi_slopes", "sinks"])
def test_hopper_reads_rows_without_gaps(name):
    with pytest.raises(ValueError, match=rf"{name}: got strides \(2,\); needs contiguous rows"):
        hopper.check_supported(for_hopper(**{name: torch.ones(8)[::2]}))


def test_nothing_of_a_gpu_is_read():
    """Fake CUDA tensors have no memory: a check that read a value, as `.item()` does, would raise."""
    with FakeTensorMode():
        q, k = torch.empty(7, 4, 64, device="cuda"), torch.empty(6, 4, 2, 64, device="cuda")
        lengths = torch.empty(2, dtype=torch.int32, device="cuda")
        starts = torch.empty(3, dtype=torch.int32, device="cuda")
        table = torch.empty(2, 3, dtype=torch.int32, device="cuda")
        arguments = {"cu_seqlens_q": starts, "seqused_k": lengths, "block_table": table, "max_seqlen_q": 4}
        problem = checks.prepare(q, k, k, max_seqlen_k=12, **arguments)
        assert problem.lse.device.type == "cuda" and problem.lse.shape == (4, 7)
        with pytest.raises(ValueError, match="block_table: got 3 pages of 4 keys; needs room for max_seqlen_k=13"):
            checks.prepare(q, k, k, max_seqlen_k=13, **arguments)
        with pytest.raises(ValueError, match="backend: got 'cpu' for tensors on cuda:0"):
            ops.choose(problem, "cpu")


def test_without_the_extension_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION_MISSING", "it was not built: reinstall with nvcc")
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        for backend in (None, "hopper"):
            with pytest.raises(
                RuntimeError, match=r"extension is not there: it was not built: reinstall with nvcc.*'reference'"
            ):
                flash_attn_func(q, q, q, backend=backend)


def test_another_gpu_than_hopper_is_refused(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(NotImplementedError, match=r"q: got .* capability \(8, 0\); .* \(9, 0\), which is Hopper"):
            flash_attn_func(q, q, q)


def test_another_device_is_refused():
    q = torch.empty(2, 5, 4, 64, device="meta")
    with pytest.raises(NotImplementedError, match="q: got a tensor on meta; needs cuda or cpu, or backend='reference'"):
        flash_attn_func(q, q, q)

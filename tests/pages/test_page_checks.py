"""Every refusal of the public functions: the argument it names, what it was given, what works."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import ops
from lite_attention.pages import (
    PAGE,
    PageLists,
    attend_pages,
    decode_pages,
    empty_sketch,
    op,
    select_pages,
    write_sketch,
)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


Q, K = torch.randn(3, 4, 16), torch.randn(5, PAGE, 2, 16)
SKETCH = torch.zeros(5, 2, 48, dtype=torch.uint8)
BATCH = {
    "cu_seqlens_q": ints(0, 1, 3),
    "seqused_k": ints(20, 30),
    "block_table": ints((0, 1), (3, 2)),
    "max_seqlen_q": 2,
}


def lists(batch=2, heads_k=2, heads=4, blocks=2):
    made = PageLists.empty(batch, heads_k, heads, blocks, torch.device("cpu"))
    for x in (made.bits, made.counts, made.left_out):
        x.zero_()
    made.indices.copy_(torch.arange(blocks))
    made.counts.fill_(blocks)
    return made


def sketch(**changes):
    write_sketch(**({"k_cache": K, "sketch": SKETCH, "pages": ints(0, 1)} | changes))


def select(**changes):
    return select_pages(**({"q": Q, "sketch": SKETCH, **BATCH, "eps": 0.1} | changes))


def attend(**changes):
    return attend_pages(**({"q": Q, "k_cache": K, "v_cache": K, "lists": lists(), **BATCH} | changes))


def decode(**changes):
    return decode_pages(**({"q": Q, "k_cache": K, "v_cache": K, "sketch": SKETCH, **BATCH, "eps": 0.1} | changes))


def empty(k_cache):
    return empty_sketch(k_cache)


CACHE = r"needs .*\(num_blocks, 16, num_heads_k, head_dim\)"
VALUE_ERRORS = [
    (empty, {"k_cache": None}, f"k_cache: got NoneType; {CACHE}"),
    (empty, {"k_cache": K[0]}, rf"k_cache: got shape \(16, 2, 16\); {CACHE}"),
    (empty, {"k_cache": torch.zeros(5, 32, 2, 16)}, rf"k_cache: got shape \(5, 32, 2, 16\); {CACHE}"),
    (sketch, {"k_cache": K.transpose(1, 2)}, rf"k_cache: got shape \(5, 2, 16, 16\); {CACHE}"),
    (sketch, {"k_cache": K.double()}, "k_cache: got torch.float64; needs torch.bfloat16 or"),
    (sketch, {"k_cache": K.transpose(2, 3).contiguous().transpose(2, 3)}, "k_cache: got strides .* of stride 1"),
    (sketch, {"sketch": None}, "sketch: got NoneType; needs a uint8 tensor"),
    (
        sketch,
        {"sketch": SKETCH[..., :16]},
        r"sketch: got shape \(5, 2, 16\); needs .*, with bytes 48 of 12 bits or 32 of 8 bits for a head_dim of 16",
    ),
    (sketch, {"sketch": SKETCH.char()}, "sketch: got torch.int8; needs torch.uint8"),
    (sketch, {"sketch": SKETCH[:4]}, r"sketch: got shape \(4, 2, 48\); needs \(5, 2, 48\)"),
    (sketch, {"sketch": SKETCH[:, :1]}, r"sketch: got shape \(5, 1, 48\); needs \(5, 2, 48\)"),
    (
        sketch,
        {"sketch": torch.zeros(5, 2, 56, dtype=torch.uint8)[..., :48]},
        r"sketch: got strides \(112, 56, 1\); needs .* at a multiple of 16 bytes",
    ),
    (
        sketch,
        {"sketch": torch.zeros(5, 2, 64, dtype=torch.uint8)[..., 8:56]},
        "sketch: got a view from byte 8 on; needs one that starts at a multiple of 16 bytes",
    ),
    (sketch, {"pages": [0, 1]}, "pages: got list; needs an int32 tensor"),
    (sketch, {"pages": ints(0, 1).long()}, "pages: got torch.int64; needs torch.int32"),
    (sketch, {"pages": ints((0, 1))}, r"pages: got shape \(1, 2\); needs \(n\)"),
    (sketch, {"pages": ints(0, 5)}, "pages: got 5; needs at most 4, or negative numbers for none"),
    (sketch, {"backend": "cuda"}, "backend: got 'cuda'; needs None or one of 'hopper', 'cpu', 'reference'"),
    (select, {"q": Q[0]}, r"q: got shape \(4, 16\); needs \(total_q, num_heads, head_dim\)"),
    (select, {"q": Q.double()}, "q: got torch.float64"),
    (select, {"q": Q[..., :0]}, r"q: got shape \(3, 4, 0\); needs num_heads and head_dim of 1 or more"),
    (select, {"q": Q[:, :3]}, "sketch: got 2 heads; needs a num_heads_k that divides the num_heads of q, 3"),
    (select, {"sketch": SKETCH[:, :0]}, "sketch: got 0 heads"),
    (select, {"sketch": torch.zeros(5, 2, 64, dtype=torch.uint8)[..., 8:56]}, "sketch: got a view from byte 8 on"),
    (select, {"seqused_k": None}, "seqused_k: got NoneType"),
    (select, {"cu_seqlens_q": ints(0, 1)}, r"cu_seqlens_q: got shape \(2,\); needs \(3\)"),
    (select, {"block_table": ints((0, 1))}, r"block_table: got shape \(1, 2\); needs \(2, max_blocks\)"),
    (select, {"max_seqlen_q": -1}, "max_seqlen_q: got -1; needs an int of 0 or more"),
    (select, {"max_seqlen_q": 1}, "max_seqlen_q: got 1; needs at least the longest"),
    (select, {"eps": -0.1}, "eps: got -0.1; needs a number from 0, which lists everything, to below 1"),
    (select, {"eps": 1.0}, "eps: got 1.0; needs"),
    (select, {"eps": math.nan}, "eps: got nan; needs"),
    (select, {"eps": True}, "eps: got True; needs"),
    (select, {"min_context": -1}, "min_context: got -1; needs an int of 0 or more, in tokens"),
    (select, {"newest": 0}, "newest: got 0; needs an int of 1 or more, in tokens"),
    (select, {"newest": 1.5}, "newest: got 1.5; needs"),
    (select, {"softmax_scale": 0.0}, "softmax_scale: got 0.0; needs a positive number, or None"),
    (select, {"k_descale": torch.ones(3)}, r"k_descale: got shape \(3,\); needs \(\) or \(2,\) or \(2, 2\)"),
    (select, {"lists": (1, 2)}, "lists: got tuple; needs PageLists, as select_pages returns"),
    (select, {"lists": lists(heads=8)}, r"lists: got shape \(2, 8\); needs \(2, 4\)"),
    (select, {"lists": lists(blocks=64)}, r"lists: got shape \(2, 2, 2\); needs \(2, 2, 1\)"),
    (
        select,
        {"lists": replace(lists(), counts=torch.zeros(2, 4, dtype=torch.int32)[:, ::2])},
        "lists: got strides .*; needs a last dimension of stride 1",
    ),
    (
        select,
        {"lists": replace(lists(), counts=torch.zeros(2, 4, dtype=torch.int32)[:, :2])},
        r"lists: got strides \(4, 1\) for shape \(2, 2\); needs contiguous tensors",
    ),
    (select, {"whole": True}, r"whole: got bool; needs None or a bool tensor \(2,\)"),
    (select, {"whole": torch.ones(3, dtype=torch.bool)}, r"whole: got torch.bool \(3,\); needs None or a bool"),
    (select, {"whole": ints(0, 1)}, r"whole: got torch.int32 \(2,\); needs None or a bool"),
    (select, {"backend": "hopper"}, "backend: got 'hopper' for tensors on cpu"),
    (attend, {"q": Q[0]}, r"q: got shape \(4, 16\); needs \(total_q"),
    (attend, {"k_cache": K[:, :8]}, rf"k_cache: got shape \(5, 8, 2, 16\); {CACHE}"),
    (attend, {"v_cache": K[:3]}, "v_cache: got shape .* needs the shape of k_cache"),
    (attend, {"lists": None}, "lists: got NoneType; needs PageLists, as select_pages returns"),
    (attend, {"lists": lists(batch=3)}, r"lists: got shape \(3, 2, 1\); needs \(2, 2, 1\)"),
    (attend, {"lists": lists(heads_k=1)}, r"lists: got shape \(2, 1, 1\); needs \(2, 2, 1\)"),
    (attend, {"lists": lists(blocks=3)}, r"lists: got shape \(2, 2, 3\); needs \(2, 2, 2\)"),
    (attend, {"block_table": None}, "block_table: got NoneType"),
    (attend, {"seqused_k": None}, "seqused_k: got NoneType"),
    (attend, {"backend": "fast"}, "backend: got 'fast'; needs"),
    (decode, {"q": Q[0]}, r"q: got shape \(4, 16\); needs \(total_q"),
    (decode, {"q": Q[..., :8].contiguous()}, "k_cache: got a head_dim of 16; needs the head_dim of q, 8"),
    (decode, {"q": Q[:, :3]}, "k_cache: got 2 heads; needs a num_heads_k that divides the num_heads of q, 3"),
    (decode, {"k_cache": K[:, :8]}, rf"k_cache: got shape \(5, 8, 2, 16\); {CACHE}"),
    (decode, {"v_cache": K[:3]}, "v_cache: got shape .* needs the shape of k_cache"),
    (decode, {"sketch": SKETCH.char()}, "sketch: got torch.int8; needs torch.uint8"),
    (decode, {"sketch": SKETCH[:4]}, r"sketch: got shape \(4, 2, 48\); needs \(5, 2, 48\)"),
    (decode, {"sketch": SKETCH[:, :1]}, r"sketch: got shape \(5, 1, 48\); needs \(5, 2, 48\)"),
    (decode, {"sketch": torch.zeros(5, 2, 64, dtype=torch.uint8)[..., 8:56]}, "sketch: got a view from byte 8 on"),
    (decode, {"seqused_k": None}, "seqused_k: got NoneType"),
    (decode, {"cu_seqlens_q": ints(0, 1)}, r"cu_seqlens_q: got shape \(2,\); needs \(3\)"),
    (decode, {"block_table": None}, "block_table: got NoneType"),
    (decode, {"max_seqlen_q": 1}, "max_seqlen_q: got 1; needs at least the longest"),
    (decode, {"eps": 1.0}, "eps: got 1.0; needs"),
    (decode, {"filled": [0, 1]}, "filled: got list; needs an int32 tensor"),
    (decode, {"filled": ints(0, 1).long()}, "filled: got torch.int64; needs torch.int32"),
    (decode, {"filled": ints((0, 1))}, r"filled: got shape \(1, 2\); needs \(n\)"),
    (decode, {"filled": ints(0, 5)}, "filled: got 5; needs at most 4, or negative numbers for none"),
    (decode, {"min_context": -1}, "min_context: got -1; needs an int of 0 or more, in tokens"),
    (decode, {"newest": 0}, "newest: got 0; needs an int of 1 or more, in tokens"),
    (decode, {"softmax_scale": 0.0}, "softmax_scale: got 0.0; needs a positive number, or None"),
    (decode, {"k_descale": torch.ones(2)}, "k_descale: got Tensor for k_cache in torch.float32; needs None, unless"),
    (decode, {"v_descale": torch.ones(2)}, "v_descale: got Tensor for v_cache in torch.float32; needs None, unless"),
    (decode, {"sinks": torch.ones(2)}, r"sinks: got shape \(2,\); needs \(4,\)"),
    (decode, {"lists": (1, 2)}, "lists: got tuple; needs PageLists, as select_pages returns"),
    (decode, {"lists": lists(blocks=3)}, r"lists: got shape \(2, 2, 3\); needs \(2, 2, 2\)"),
    (decode, {"whole": torch.ones(3, dtype=torch.bool)}, r"whole: got torch.bool \(3,\); needs None or a bool"),
    (decode, {"scheduler_metadata": torch.ones(9)}, "scheduler_metadata: got torch.float32; needs torch.int32"),
    (decode, {"out": Q[:2]}, "out: got shape .* needs the shape of q"),
    (decode, {"num_splits": -1}, "num_splits: got -1; needs 0 or a positive int"),
    (decode, {"backend": "fast"}, "backend: got 'fast'; needs"),
]


@pytest.mark.parametrize(("call", "changes", "message"), VALUE_ERRORS)
def test_refusals(call, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(**changes)


@pytest.mark.parametrize(
    ("call", "name", "x"),
    [
        (sketch, "k_cache", K),
        (select, "q", Q),
        (attend, "q", Q),
        (attend, "v_cache", K),
        (decode, "q", Q),
        (decode, "k_cache", K),
    ],
)
def test_there_is_no_backward_pass(call, name, x):
    with pytest.raises(NotImplementedError, match=f"{name}: got a tensor that requires grad"):
        call(**{name: x.clone().requires_grad_()})
    with torch.no_grad():
        call(**{name: x.clone().requires_grad_()})


def test_on_a_gpu_nothing_falls_back(monkeypatch):
    monkeypatch.setattr(ops, "EXTENSION_MISSING", "this test says so")
    with FakeTensorMode():
        k = torch.empty(5, PAGE, 2, 16, device="cuda")
        arguments = k, empty_sketch(k), torch.empty(2, dtype=torch.int32, device="cuda")
        with pytest.raises(RuntimeError, match="extension is not there: this test says so"):
            write_sketch(*arguments)
        with pytest.raises(ValueError, match="backend: got 'cpu' for tensors on cuda"):
            write_sketch(*arguments, backend="cpu")


def on_hopper(monkeypatch, call, arguments):
    """The call as on a Hopper GPU, up to the launch."""
    monkeypatch.setattr(ops, "backend_on", lambda device, backend: "hopper")
    monkeypatch.setattr(op, "_op", lambda name, backend: lambda *args: None)
    call(**arguments)


KEYS = torch.randn(5, PAGE, 2, 16).half()


@pytest.mark.parametrize(
    ("k_cache", "error", "message"),
    [
        (K, NotImplementedError, "k_cache: got torch.float32; the Hopper kernels have torch.bfloat16"),
        (KEYS[..., :12], NotImplementedError, "k_cache: got head_dim 12; the Hopper kernels have multiples of 8 up"),
        (torch.randn(5, PAGE, 2, 20).half()[..., :16], ValueError, "k_cache: got strides .* multiples of 8 elements"),
        (KEYS, None, ""),
    ],
)
def test_what_the_hopper_kernels_have_not_sketches(monkeypatch, k_cache, error, message):
    arguments = {"k_cache": k_cache, "sketch": empty_sketch(k_cache), "pages": ints(0, 1)}
    with pytest.raises(error, match=f"^{message}") if error else nullcontext():
        on_hopper(monkeypatch, write_sketch, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q}, "q: got torch.float32; the Hopper kernels have torch.bfloat16"),
        ({"max_seqlen_q": 33}, "max_seqlen_q: got 33 query tokens of 2 query heads to a KV head; the Hopper kernels"),
        ({"max_seqlen_q": 32}, None),
    ],
)
@pytest.mark.parametrize("call", [select_pages, attend_pages, decode_pages])
def test_what_the_hopper_kernels_have_not(monkeypatch, call, changes, message):
    arguments = {"q": Q.half(), **BATCH, **changes}
    if call is not attend_pages:
        arguments |= {"sketch": SKETCH, "eps": 0.1}
    if call is not select_pages:
        cache = K.to(arguments["q"].dtype)
        arguments |= {"k_cache": cache, "v_cache": cache, "lists": lists()}
    if call is decode_pages and message:  # the cache is the first that it looks at, and of the dtype of q
        message = message.replace("q: got torch.float32", "k_cache: got torch.float32")

    with pytest.raises(NotImplementedError, match=f"^{message}") if message else nullcontext():
        on_hopper(monkeypatch, call, arguments)


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_all_tensors_are_on_one_device(device):
    with FakeTensorMode():
        k = torch.empty(5, PAGE, 2, 16)
        elsewhere = torch.empty(5, 2, 48, dtype=torch.uint8, device=device)
        with pytest.raises(ValueError, match=f"sketch: got a tensor on {device}.*; needs one on cpu"):
            write_sketch(k, elsewhere, torch.empty(2, dtype=torch.int32))

"""Every refusal of a call with a list: the error's type, the argument it names, what it was given, what works."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lite_attention import (
    LiteAttention,
    SkipList,
    ops,
    skip_attention,
    skip_attention_varlen,
    skip_attention_with_kvcache,
)
from lite_attention.skip import hopper

Q, K = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def fresh(batch=2, heads=4, seqlen_q=5, seqlen_k=9, tile=(4, 4), device=None):
    return SkipList.fresh(batch, heads, seqlen_q, seqlen_k, tile=tile, device=device)


def dense(**changes):
    return skip_attention(**({"q": Q, "k": K, "v": K, "skip_list": fresh(), "threshold": -1.0} | changes))


def packed(**changes):
    arguments = {
        "q": torch.randn(7, 4, 16),
        "k": torch.randn(12, 2, 16),
        "v": torch.randn(12, 2, 16),
        "skip_list": fresh(seqlen_q=4, seqlen_k=10),
        "threshold": -1.0,
        "cu_seqlens_q": ints(0, 3, 7),
        "cu_seqlens_k": ints(0, 2, 12),
        "max_seqlen_q": 4,
        "max_seqlen_k": 10,
    }
    return skip_attention_varlen(**(arguments | changes))


def cache(**changes):
    arguments = {"q": Q, "k_cache": K, "v_cache": K, "skip_list": fresh(), "threshold": -1.0}
    return skip_attention_with_kvcache(**(arguments | changes))


def spoiled(**changes):
    """A list whose attributes were changed after it was made."""
    skip_list = fresh()
    for name, value in changes.items():
        setattr(skip_list, name, value)
    return skip_list


BITS = fresh().bits  # (2, 4, 2, 1)

VALUE_ERRORS = [
    (dense, {"skip_list": None}, "skip_list: got NoneType; needs a SkipList, as SkipList.fresh makes"),
    (dense, {"skip_list": BITS}, "skip_list: got Tensor; needs a SkipList, as SkipList.fresh makes"),
    (dense, {"skip_list": fresh(batch=3)}, "skip_list: got a list for a batch of 3; needs one for that of the call, 2"),
    (
        dense,
        {"skip_list": fresh(heads=2)},
        "skip_list: got a list for num_heads of 2; needs one for that of the call, 4",
    ),
    (
        dense,
        {"skip_list": fresh(seqlen_q=6)},
        "skip_list: got a list for max_seqlen_q of 6; needs one for that of the call, 5",
    ),
    (
        dense,
        {"skip_list": fresh(seqlen_k=10)},
        "skip_list: got a list for max_seqlen_k of 10; needs one for that of the call, 9",
    ),
    (
        packed,
        {"skip_list": fresh()},
        "skip_list: got a list for max_seqlen_q of 5; needs one for that of the call, 4",
    ),
    (
        cache,
        {"skip_list": fresh(seqlen_k=12)},
        "skip_list: got a list for max_seqlen_k of 12; needs one for that of the call, 9",
    ),
    (
        dense,
        {"skip_list": spoiled(bits=BITS[:, :, :1])},
        "skip_list: got shape (2, 4, 1, 1); needs (batch, num_heads, 2, 1)",
    ),
    (
        dense,
        {"skip_list": spoiled(bits=BITS.repeat(1, 1, 1, 2))},
        "skip_list: got shape (2, 4, 2, 2); needs (batch, num_heads, 2, 1)",
    ),
    (
        dense,
        {"skip_list": spoiled(bits=BITS[0])},
        "skip_list: got shape (4, 2, 1); needs (batch, num_heads, 2, 1)",
    ),
    (dense, {"skip_list": spoiled(bits=BITS.long())}, "skip_list: got torch.int64; needs torch.int32"),
    (dense, {"skip_list": spoiled(bits=None)}, "skip_list: got NoneType; needs an int32 tensor"),
    (
        dense,
        {"skip_list": spoiled(bits=BITS.transpose(0, 1).contiguous().transpose(0, 1))},
        "skip_list: got strides (2, 4, 1, 1); needs contiguous bits",
    ),
    (
        dense,
        {"skip_list": spoiled(bits=BITS[:1].expand(2, 4, 2, 1))},
        "skip_list: got strides (0, 2, 1, 1); needs contiguous bits",
    ),
    (dense, {"skip_list": spoiled(block_m=2)}, "skip_list: got shape (2, 4, 2, 1); needs (batch, num_heads, 3, 1)"),
    (
        dense,
        {"skip_list": fresh(device="meta")},
        "skip_list: got a list on meta; needs one on the device of q, cpu",
    ),
    *(
        (
            call,
            {"threshold": given},
            f"threshold: got {given}; needs a number of at most 0, or a float32 tensor () or (4,)",
        )
        for call in (dense, packed, cache)
        for given in (0.5, math.inf, math.nan, True, None, "-10", [-1.0])
    ),
    (dense, {"threshold": torch.zeros(3)}, "threshold: got shape (3,); needs () or (4,)"),
    (dense, {"threshold": torch.zeros(2, 4)}, "threshold: got shape (2, 4); needs () or (4,)"),
    (dense, {"threshold": torch.zeros(4).half()}, "threshold: got torch.float16; needs torch.float32"),
    (
        dense,
        {"threshold": torch.zeros(4, device="meta")},
        "threshold: got a tensor on meta; needs one on the device of q, cpu",
    ),
    (
        dense,
        {"threshold": torch.tensor([-1.0, 0.5, 0, 0])},
        "threshold: got [-1.0, 0.5, 0.0, 0.0]; needs values of at most 0",
    ),
    (dense, {"threshold": torch.tensor(math.nan)}, "threshold: got nan; needs values of at most 0"),
    *(
        error
        for name in ("must_do", "must_skip")
        for error in (
            (dense, {name: [(0, 10)]}, f"{name}: got (0, 10); needs 0 <= begin <= end <= 9, the keys of the list"),
            (dense, {name: torch.zeros(2, 2, dtype=torch.int32)}, f"{name}: got shape (2, 2); needs (2, 1)"),
            (dense, {name: torch.zeros(2, 1)}, f"{name}: got torch.float32; needs torch.int32"),
            (
                dense,
                {name: torch.zeros(2, 1, device="meta", dtype=torch.int32)},
                f"{name}: got a tensor on meta; needs one on the device of q, cpu",
            ),
            (
                dense,
                {name: torch.zeros(1, 1, dtype=torch.int32).expand(2, 1)},
                f"{name}: got strides (0, 1); needs a contiguous mask",
            ),
        )
    ),
    # What dense attention refuses too.
    (dense, {"q": None}, "q: got NoneType; needs a tensor (batch, seqlen_q, num_heads, head_dim)"),
    (dense, {"k": K[:, :8]}, "v: got shape (2, 9, 2, 16); needs the shape of k, (2, 8, 2, 16)"),
    (dense, {"softmax_scale": 0.0}, "softmax_scale: got 0.0; needs a positive number, or None for 1 / sqrt(head_dim)"),
    (dense, {"window_size": 3}, "window_size: got 3; needs (left, right)"),
    (dense, {"sinks": torch.zeros(3)}, "sinks: got shape (3,); needs (4,)"),
    (dense, {"out": torch.zeros(2, 5, 4, 8)}, "out: got shape (2, 5, 4, 8); needs the shape of q, (2, 5, 4, 16)"),
    (dense, {"backend": "fa3"}, "backend: got 'fa3'; needs None or one of 'hopper', 'cpu', 'reference'"),
    (packed, {"cu_seqlens_q": None}, "cu_seqlens_q: got None; needs an int32 tensor (batch + 1,)"),
    (packed, {"cu_seqlens_k": None}, "cu_seqlens_k: got None; needs a tensor, where k is packed"),
    (
        packed,
        {"cu_seqlens_k": ints(0, 1, 12)},
        "max_seqlen_k: got 10; needs at least the longest sequence of cu_seqlens_k, 11",
    ),
    (
        packed,
        {"cu_seqlens_q": ints(0, 2, 7)},
        "max_seqlen_q: got 4; needs at least the longest sequence of cu_seqlens_q, 5",
    ),
    (cache, {"cache_seqlens": 10}, "cache_seqlens: got 10; needs at most the 9 keys that there is room for"),
    (cache, {"cache_seqlens": ints(3, 10)}, "got 10 for sequence 1; needs at most the 9 keys that it has"),
    (cache, {"cache_seqlens": -1}, "cache_seqlens: got -1; needs an int of 0 or more"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("call", "changes", "message"), VALUE_ERRORS)
def test_value_errors(call, changes, message, backend):
    out = torch.full_like(Q, 7.0)
    arguments = {"backend": backend} | ({"out": out} if call is not packed else {}) | changes
    skip_list = arguments.get("skip_list")
    before = skip_list.bits.clone() if isinstance(getattr(skip_list, "bits", None), torch.Tensor) else None
    with pytest.raises(ValueError) as error:
        call(**arguments)
    assert message in str(error.value)
    assert (out == 7).all(), "it raises before anything is computed"
    if before is not None and before.device.type == "cpu":
        assert torch.equal(skip_list.bits, before)


@pytest.mark.parametrize("call", [dense, packed, cache])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"softcap": 30.0}, "softcap: got 30.0; attention with skip lists has only softcap=0.0"),
        (
            {"alibi_slopes": torch.zeros(4)},
            "alibi_slopes: got Tensor; attention with skip lists has only alibi_slopes=None",
        ),
        ({"q": Q.to(torch.float8_e4m3fn)}, "q: got torch.float8_e4m3fn; attention with skip lists has torch.bfloat16"),
        ({"q": Q.clone().requires_grad_()}, "q: got a tensor that requires grad"),
        ({"threshold": torch.zeros((), requires_grad=True)}, "threshold: got a tensor that requires grad"),
    ],
)
def test_what_is_not_built_is_named(call, changes, message):
    with pytest.raises(NotImplementedError) as error:
        call(**changes)
    assert message in str(error.value)


FP8 = torch.float8_e4m3fn


def fp8_message(name, dtype=FP8):
    has = "attention with skip lists has torch.bfloat16, torch.float16 and torch.float32"
    return f"{name}: got {dtype}; {has}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
@pytest.mark.parametrize(("call", "names"), [(dense, "k v"), (packed, "k v"), (cache, "k_cache v_cache")])
def test_fp8_keys_and_values_are_refused(call, names, dtype, backend):
    """Not computed as if their scale were 1."""
    layout = (12, 2, 16) if call is packed else K.shape
    q = torch.randn((7, 4, 16) if call is packed else Q.shape).bfloat16()
    k, v = names.split()
    for fp8 in ((k, v), (k,), (v,)):
        given = {name: torch.randn(layout).to(dtype if name in fp8 else torch.bfloat16) for name in (k, v)}
        with pytest.raises(NotImplementedError) as error:
            call(q=q, backend=backend, **given)
        assert str(error.value) == fp8_message(fp8[0], dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("skipping", [True, False])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_module_refuses_fp8_and_takes_no_state_from_it(name, skipping, backend):
    attention = LiteAttention(skipping, tile=(4, 4), backend=backend)
    tensors = {"q": Q.bfloat16(), "k": K.bfloat16(), "v": K.bfloat16()}
    tensors |= {one: tensors[one].to(FP8) for one in {"q": "q", "k": "kv", "v": "v"}[name]}
    with pytest.raises(NotImplementedError) as error:
        attention(**tensors)
    assert str(error.value) == fp8_message(name)
    assert attention.streams == ()


@pytest.mark.parametrize("call", [dense, packed, cache])
def test_the_calls_that_the_errors_start_from_work(call):
    out, lse = call()
    assert out.isfinite().all() and lse.isfinite().all()


class TestHopper:
    """Refusals on a GPU, by tensors without memory."""

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        monkeypatch.setattr(ops, "EXTENSION_MISSING", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(hopper, "_has_kernels", lambda: True)
        with FakeTensorMode():
            yield

    def call(self, head_dim=128, seqlen_k=300, tile=None, **changes):
        q, k = (
            torch.empty(2, n, h, head_dim, device="cuda", dtype=torch.bfloat16) for n, h in ((200, 4), (seqlen_k, 2))
        )
        shape = {"tile": tile} if tile else {"head_dim": head_dim}
        skip_list = SkipList.fresh(2, 4, 200, seqlen_k, **shape, device="cuda")
        return skip_attention(q, k, k, skip_list, **({"threshold": -1.0} | changes))

    @pytest.mark.parametrize("head_dim", [8, 64, 96, 104, 128, 136, 256])
    def test_its_own_tiles_are_taken(self, head_dim):
        out, lse = self.call(head_dim, must_do=torch.zeros(2, 1, dtype=torch.int32, device="cuda"))
        assert out.device.type == "cuda" and lse.shape == (2, 4, 200)

    def test_another_tile_shape_is_refused(self):
        with pytest.raises(ValueError) as error:
            self.call(tile=(128, 128))
        assert str(error.value) == (
            "skip_list: got tiles of (128, 128); needs (128, 176) for a head_dim of 128 on a Hopper GPU, as "
            "SkipList.fresh(head_dim=...) has"
        )
        assert self.call(tile=(128, 176))
        assert self.call(tile=(128, 128), backend="reference")

    def test_other_head_dims_are_refused(self):
        with pytest.raises(NotImplementedError, match=r"q: got head_dim 100; .* multiples of 8 up to 256"):
            self.call(100)
        assert self.call(100, backend="reference")

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_fp8_is_refused(self, backend):
        q, k = (torch.empty(2, n, 2, 128, device="cuda", dtype=torch.bfloat16) for n in (200, 300))
        skip_list = SkipList.fresh(2, 2, 200, 300, head_dim=128, device="cuda")
        starts = [torch.empty(3, dtype=torch.int32, device="cuda") for _ in range(2)]
        fp8 = k.to(FP8)
        for name, call in (
            ("k", lambda: skip_attention(q, fp8, fp8, skip_list, -1.0, backend=backend)),
            ("v", lambda: skip_attention(q, k, fp8, skip_list, -1.0, backend=backend)),
            ("k_cache", lambda: skip_attention_with_kvcache(q, fp8, fp8, skip_list, -1.0, 300, backend=backend)),
            (
                "k",
                lambda: skip_attention_varlen(
                    q.flatten(0, 1),
                    fp8.flatten(0, 1),
                    fp8.flatten(0, 1),
                    skip_list,
                    -1.0,
                    *starts,
                    200,
                    300,
                    backend=backend,
                ),
            ),
            ("k", lambda: LiteAttention(backend=backend)(q, fp8, fp8)),
        ):
            with pytest.raises(NotImplementedError) as error:
                call()
            assert str(error.value) == fp8_message(name)

    def test_more_keys_than_the_kernels_reach_are_refused(self):
        assert self.call(seqlen_k=1 << 20)
        with pytest.raises(NotImplementedError, match=r"max_seqlen_k: got 1048577; .* have up to 1048576"):
            self.call(seqlen_k=(1 << 20) + 1)

    def test_an_extension_without_lists_is_named(self, monkeypatch):
        monkeypatch.setattr(hopper, "_has_kernels", lambda: False)
        with pytest.raises(RuntimeError, match="built without the kernels with skip lists"):
            self.call()

    def test_lists_on_another_device_are_refused(self):
        with pytest.raises(ValueError, match="skip_list: got a list on cpu; needs one on the device of q, cuda:0"):
            q = torch.empty(2, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
            skip_attention(q, q, q, SkipList.fresh(2, 4, 5, 5, head_dim=64, device="cpu"), -1.0)


def test_only_metadata_is_read():
    """A fake tensor raises where it is read, as a GPU's would wait."""
    with FakeTensorMode():
        q = torch.empty(2, 5, 4, 64)
        ranges = torch.empty(2, 3, 2, dtype=torch.int32)
        out, _ = skip_attention(q, q, q, fresh(seqlen_k=5), torch.empty(4), must_do=ranges, must_skip=ranges)
        assert out.shape == q.shape

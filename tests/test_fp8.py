"""FP8 queries, keys and values: what is refused, what a scale means, what bytes do; `cases.py` has all layouts."""

from __future__ import annotations

import pytest
import torch
from cases import assert_close

from lite_attention import (
    LiteAttention,
    checks,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    hopper,
)

FP8 = torch.float8_e4m3fn
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def inputs(dtype=torch.bfloat16, head_dim=16):
    """q (2, 5, 4, d), k and v (2, 9, 2, d)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 5, 4, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 9, 2, head_dim, generator=generator).to(FP8).unbind()
    return q, k, v


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"k": torch.zeros(2, 9, 2, 16).bfloat16()},
            "v: got torch.float8_e4m3fn; needs the dtype of k, torch.bfloat16",
        ),
        (
            {"v": torch.zeros(2, 9, 2, 16).bfloat16()},
            "v: got torch.bfloat16; needs the dtype of k, torch.float8_e4m3fn",
        ),
        (
            {"k": torch.zeros(2, 9, 2, 16).to(torch.float8_e5m2)},
            "k: got torch.float8_e5m2; needs the dtype of q, torch.bfloat16, or torch.float8_e4m3fn",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 16).to(torch.float8_e5m2)},
            "q: got torch.float8_e5m2; needs torch.bfloat16 or torch.float16 or torch.float32 or torch.float8_e4m3fn",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 16).to(FP8), "k": torch.zeros(2, 9, 2, 16).bfloat16()},
            "k: got torch.bfloat16; needs the dtype of q, torch.float8_e4m3fn",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 16).to(FP8), "v": torch.zeros(2, 9, 2, 16).bfloat16()},
            "v: got torch.bfloat16; needs the dtype of q, torch.float8_e4m3fn",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 16).to(FP8), "out": torch.zeros(2, 5, 4, 16).half()},
            "out: got torch.float16; needs torch.bfloat16 where q is torch.float8_e4m3fn",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 16).to(FP8), "q_descale": torch.ones(2, 4)},
            "q_descale: got shape (2, 4); needs (batch, num_heads_k) = (2, 2), or one that broadcasts to it",
        ),
        (
            {"out": torch.zeros(2, 5, 4, 16).to(FP8)},
            "out: got torch.float8_e4m3fn; needs the dtype of q, torch.bfloat16",
        ),
        ({"k_descale": 2.0}, "k_descale: got float; needs a float32 tensor"),
        ({"v_descale": torch.ones(2).double()}, "v_descale: got torch.float64; needs torch.float32"),
        (
            {"k_descale": torch.ones(4)},
            "k_descale: got shape (4,); needs (batch, num_heads_k) = (2, 2), or one that broadcasts to it",
        ),
        (
            {"v_descale": torch.ones(3, 2)},
            "v_descale: got shape (3, 2); needs (batch, num_heads_k) = (2, 2), or one that broadcasts to it",
        ),
        (
            {"v_descale": torch.ones(1, 2, 2)},
            "v_descale: got shape (1, 2, 2); needs (batch, num_heads_k) = (2, 2), or one that broadcasts to it",
        ),
        (
            {"k_descale": torch.ones(2, device="meta")},
            "k_descale: got a tensor on meta; needs one on the device of q, cpu",
        ),
    ],
    ids=lambda x: x[:50] if isinstance(x, str) else None,
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError) as error:
        flash_attn_func(**(dict(zip("qkv", inputs(), strict=True)) | changes))
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["q_descale", "k_descale", "v_descale"])
def test_only_fp8_has_a_scale(name):
    q = torch.zeros(2, 5, 4, 16).bfloat16()
    message = (
        f"{name}: got Tensor for {name[0]} in torch.bfloat16; needs None, unless {name[0]} is in torch.float8_e4m3fn"
    )
    with pytest.raises(ValueError) as error:
        flash_attn_func(q, q, q, **{name: torch.ones(())})
    assert str(error.value) == message


@BACKENDS
@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_scale_is_a_factor_of_what_is_stored(backend, shape, dtype):
    q, k, v = inputs(dtype)
    k_descale, v_descale = torch.rand(shape) + 0.5, torch.rand(shape) + 0.5
    out, lse = flash_attn_func(
        q, k, v, k_descale=k_descale, v_descale=v_descale, return_softmax_lse=True, backend=backend
    )
    values = (x.float() * descale.expand(2, 2)[:, None, :, None] for x, descale in ((k, k_descale), (v, v_descale)))
    expected, expected_lse = flash_attn_func(q.float(), *values, return_softmax_lse=True, backend="reference")
    assert out.dtype == dtype
    assert_close(out.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (2, 2)])
@pytest.mark.parametrize("rows", [1, 5])
def test_query_heads_share_the_scale_of_their_kv_head(backend, shape, rows):
    q, k, v = inputs()
    q = q[:, :rows].to(FP8)
    descales = {f"{name}_descale": torch.rand(shape) + 0.5 for name in "qkv"}
    out, lse = flash_attn_func(q, k, v, **descales, return_softmax_lse=True, backend=backend)
    factors = {name: descale.expand(2, 2)[:, None, :, None] for name, descale in descales.items()}
    q = q.float() * factors["q_descale"].repeat_interleave(2, 2)
    k, v = k.float() * factors["k_descale"], v.float() * factors["v_descale"]
    expected, expected_lse = flash_attn_func(q, k, v, return_softmax_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, rtol=torch.finfo(out.dtype).eps, atol=1e-5)
    assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@BACKENDS
def test_fp8_queries_write_to_a_bfloat16_out(backend):
    q, k, v = inputs()
    out = torch.full(q.shape, torch.nan).bfloat16()
    assert flash_attn_func(q.to(FP8), k, v, out=out, backend=backend) is out
    assert_close(out, flash_attn_func(q.to(FP8), k, v, backend=backend), rtol=0, atol=0)


def test_only_dense_attention_has_fp8_queries():
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match=r"q: got torch.float8_e4m3fn; attention with skip lists has"):
        LiteAttention(tile=(16, 16))(q.to(FP8), k, v)


@BACKENDS
def test_every_byte_is_read_as_its_value(backend):
    """One key a sequence, so that its value is the result: subnormals, zeros of both signs, the largest, NaN."""
    v = torch.arange(256, dtype=torch.uint8).view(16, 1, 1, 16).view(FP8)
    q, k = torch.ones(16, 1, 1, 16).bfloat16(), torch.ones(16, 1, 1, 16).to(FP8)
    out = flash_attn_func(q, k, v, backend=backend)
    assert_close(out, v.bfloat16(), rtol=0, atol=0)
    assert out.isnan().sum() == 2


@BACKENDS
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(backend):
    q, k, v = inputs()
    k[:, 6] = torch.nan
    out = flash_attn_func(q, k, v, causal=True, backend=backend)
    assert out[:, :2].isfinite().all() and out[:, 2:].isnan().all()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_pages(backend, dtype):
    """As a pair of views of one cache of bytes, which is how vLLM keeps it."""
    q, k, v = inputs()
    cache = torch.full((7, 4, 2, 32), 0x7F, dtype=torch.uint8)  # NaN
    table = torch.tensor([[5, 0, 3], [1, 6, 2]], dtype=torch.int32)
    for b, pages in enumerate(table.tolist()):
        for i, page in enumerate(pages):
            some = slice(4 * i, min(4 * i + 4, 9))
            stored = torch.cat([k[b, some], v[b, some]], -1)
            cache[page, : len(stored)] = stored.view(torch.uint8)
    arguments = {"k_descale": torch.tensor([0.5, 3.0]), "v_descale": torch.tensor(0.1), "causal": True}
    if dtype == FP8:
        q, arguments["q_descale"] = q.to(FP8), torch.tensor([[0.7, 2.0], [1.5, 0.2]])
    expected = flash_attn_func(q, k, v, **arguments, backend="reference")
    for rows in (5, 1):  # the CPU path has a way of its own for single rows
        out = flash_attn_varlen_func(
            q[:, -rows:].flatten(0, 1),
            cache.view(FP8)[..., :16],
            cache.view(FP8)[..., 16:],
            torch.tensor([0, rows, 2 * rows], dtype=torch.int32),
            None,
            rows,
            9,
            seqused_k=torch.tensor([9, 9], dtype=torch.int32),
            block_table=table,
            **arguments,
            backend=backend,
        )
        assert_close(out.view(2, rows, 4, 16), expected[:, -rows:], rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("paged", [False, True])
def test_append_writes_fp8_as_it_is(paged):
    q, k, v = inputs()
    caches = [torch.full((2, 12, 2, 16), torch.nan, dtype=FP8) for _ in "kv"]
    kwargs = {"k_descale": torch.tensor([[2.0, 0.5]]), "v_descale": torch.tensor([3.0]), "causal": True}
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :4] = x[:, :4]
    if paged:
        caches = [cache.view(6, 4, 2, 16) for cache in caches]
        kwargs["block_table"] = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, *caches, k[:, 4:], v[:, 4:], cache_seqlens=4, **kwargs)
    for cache, x in zip(caches, (k, v), strict=True):
        assert torch.equal(cache.view(2, 12, 2, 16)[:, :9].view(torch.uint8), x.view(torch.uint8))
    kwargs.pop("block_table", None)
    assert_close(out, flash_attn_func(q, k, v, **kwargs), rtol=2**-7, atol=1e-3)


def test_what_is_appended_must_be_fp8_too():
    """The scale to quantise with is the caller's, so nothing is quantised here."""
    q, k, v = inputs()
    for bad, name in ((k.bfloat16(), "k"), (v.bfloat16(), "v")):
        new = {"k": k[:, :2], "v": v[:, :2], name: bad[:, :2]}
        with pytest.raises(ValueError) as error:
            flash_attn_with_kvcache(q, k.clone(), v.clone(), **new, cache_seqlens=3)
        assert str(error.value) == f"{name}: got torch.bfloat16; needs the dtype of {name}_cache, torch.float8_e4m3fn"


# What the kernels take, checked before they are called


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 128, 208, 256])
def test_head_dims_that_hopper_has(head_dim):
    hopper.check_supported(checks.prepare(*inputs(head_dim=head_dim)))


@pytest.mark.parametrize("head_dim", [8, 40, 72, 248])
def test_head_dims_that_hopper_lacks(head_dim):
    message = f"q: got head_dim {head_dim} with keys in torch.float8_e4m3fn; the Hopper kernels have multiples of 16 up"
    with pytest.raises(NotImplementedError, match=message):
        hopper.check_supported(checks.prepare(*inputs(head_dim=head_dim)))


def test_hopper_has_fp8_queries():
    q, k, v = inputs(head_dim=48)
    hopper.check_supported(checks.prepare(q.to(FP8), k, v, fp8_q=True))
    with pytest.raises(ValueError, match=r"q: got strides .* positive multiples of 16 elements on a Hopper GPU"):
        hopper.check_supported(checks.prepare(torch.zeros(2, 5, 4, 56).to(FP8)[..., :48], k, v, fp8_q=True))


def test_hopper_strides():
    q, k, _ = inputs()
    wide = torch.zeros(2, 9, 2, 24).to(FP8)[..., :16]
    with pytest.raises(ValueError, match=r"v: got strides .* positive multiples of 16 elements on a Hopper GPU"):
        hopper.check_supported(checks.prepare(q, k, wide))

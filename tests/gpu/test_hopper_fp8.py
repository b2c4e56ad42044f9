"""The Hopper kernels over FP8 keys and values, beside queries of 16 bits and of FP8.

The rule is that of `accuracy.py`, on the values that FP8 stands for.
"""

from __future__ import annotations

import math
import random as py_random
from functools import partial

import accuracy
import pytest
import torch
from test_hopper import LAYOUTS, every_head_dim, random_case

from lite_attention import flash_attn_func, get_scheduler_metadata

FP8 = accuracy.FP8
every_kernel = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8], ids=["bf16", "fp16", "fp8"])


def out_dtype(dtype):
    return torch.bfloat16 if dtype == FP8 else dtype


def scales(rng, batch, heads_k, dtype):
    """Of one of the shapes that a call takes, or none."""
    shape = rng.choice([None, (), (1,), (heads_k,), (batch, 1), (batch, heads_k)])
    if shape is None:
        return {}
    generator = torch.Generator("cuda").manual_seed(rng.randrange(1000))
    names = ["k_descale", "v_descale"] + ["q_descale"] * (dtype == FP8)
    return {name: torch.rand(shape, device="cuda", generator=generator) + 0.5 for name in names}


@every_kernel
@every_head_dim
@pytest.mark.parametrize("modified", [False, True], ids=["plain", "modified"])
@pytest.mark.parametrize("tile", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_random_shapes(tile, modified, head_dim, dtype, seed):
    rng = py_random.Random(f"fp8 {tile} {modified} {head_dim} {dtype} {seed}")
    case = random_case(rng, tile, modified, seed, head_dim, dtype, FP8, partial(scales, dtype=dtype))
    accuracy.check(case, *case.run())


@every_kernel
@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 100], ids=["decode", "prefill"])
def test_every_byte_is_converted_exactly(head_dim, dtype, seqlen_q):
    """One key a sequence, whose value is then the result: subnormals, both zeros, NaN, at every place of a row."""
    v = torch.arange(256, device="cuda")[:, None] + torch.arange(head_dim, device="cuda")
    v = (v % 256).to(torch.uint8).view(256, 1, 1, head_dim).view(FP8)
    q = torch.ones(256, seqlen_q, 1, head_dim, device="cuda").to(dtype)
    out = flash_attn_func(q, q[:, :1].to(FP8), v)
    torch.testing.assert_close(out, v.to(out_dtype(dtype)).expand_as(out), rtol=0, atol=0, equal_nan=True)
    lse = flash_attn_func(q[:, :1], v, v, softmax_scale=1 / head_dim, return_softmax_lse=True)[1]
    torch.testing.assert_close(lse[:, 0, 0], v.float().mean((1, 2, 3)), rtol=1e-3, atol=1e-3, equal_nan=True)


@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 100], ids=["decode", "prefill"])
def test_products_of_fp8_queries(head_dim, seqlen_q):
    """One key a sequence, whose score is then the lse: exact for small integers; each byte at every place of a row."""
    generator = torch.Generator("cuda").manual_seed(0)
    some = lambda n: torch.randint(-3, 4, (64, n, 1, head_dim), device="cuda", generator=generator).float()  # noqa: E731
    q, k = some(seqlen_q), some(1)
    lse = flash_attn_func(q.to(FP8), k.to(FP8), k.to(FP8), softmax_scale=1.0, return_softmax_lse=True)[1]
    torch.testing.assert_close(lse[:, 0], (q * k).sum((2, 3)), rtol=1e-6, atol=1e-5)
    q = torch.arange(256, device="cuda")[:, None] + torch.arange(head_dim, device="cuda")
    q = (q % 256).to(torch.uint8).view(256, 1, 1, head_dim).expand(-1, seqlen_q, -1, -1).contiguous().view(FP8)
    k = torch.ones(256, 1, 1, head_dim, device="cuda").to(FP8)
    lse = flash_attn_func(q, k, k, softmax_scale=1 / head_dim, return_softmax_lse=True)[1]
    torch.testing.assert_close(lse[:, 0], q.float().mean((2, 3)), rtol=1e-3, atol=1e-3, equal_nan=True)


@every_head_dim
def test_a_nan_in_a_query_reaches_its_own_row(head_dim):
    q, k, v = accuracy.make_sequences([300], [500], 4, 2, head_dim, FP8, 4, FP8)[0]
    q[200, 3, head_dim - 3] = torch.nan
    (out,) = flash_attn_func(q[None], k[None], v[None])
    assert out[200, 3].isnan().all() and out.isnan().sum() == head_dim


@every_kernel
@every_head_dim
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("seqlen_q", [1, 300], ids=["decode", "prefill"])
def test_a_nan_that_is_seen_is_not_lost(head_dim, dtype, name, seqlen_q):
    sequences = accuracy.make_sequences([seqlen_q] * 2, [700, 700], 4, 2, head_dim, dtype, 3, FP8)
    q, k, v = sequences[1]
    (k if name == "k" else v)[600, 1, head_dim - 3] = torch.nan
    out, lse = accuracy.packed([sequences[0], (q, k, v)], causal=True).run()
    case = accuracy.packed(sequences[:1], causal=True)
    accuracy.check(case, out[:seqlen_q], lse[:, :seqlen_q])
    second = out[seqlen_q:]
    sees = torch.arange(seqlen_q, device="cuda") + 700 - seqlen_q >= 600
    assert not second[:, :2].isnan().any()
    if name == "k":  # a value reaches all rows of a tile of which one sees it
        assert not second[~sees].isnan().any()
    hit = second[sees][:, 2:] if name == "k" else second[sees][:, 2:, head_dim - 3]
    assert hit.isnan().all()


@every_kernel
@every_head_dim
@pytest.mark.parametrize("page_size", [16, 64])
def test_long_decode_is_split_and_summed(head_dim, dtype, page_size):
    sequences = accuracy.make_sequences([1, 1, 1], [20001, 5, 7777], 8, 2, head_dim, dtype, 1, FP8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 3.0], [1.5, 0.25]], device="cuda")
    case = accuracy.paged(sequences, page_size, causal=True, k_descale=scale, v_descale=scale.flip(0))
    first = case.run()
    accuracy.check(case, *first)
    for _ in range(5):
        again = case.run()
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@every_kernel
@every_head_dim
@pytest.mark.parametrize("causal", [False, True])
def test_many_items_are_dealt_whole(head_dim, dtype, causal):
    lens = [300, 1, 0, 900, 128, 511] * 4
    sequences = accuracy.make_sequences(lens, lens, 32, 8, head_dim, dtype, 2, FP8)
    case = accuracy.packed(sequences, slack=0, causal=causal, v_descale=torch.rand(24, 8, device="cuda") + 0.5)
    accuracy.check(case, *case.run())


@every_kernel
@pytest.mark.parametrize("head_dim", [16, 48, 80, 112, 144, 208, 240])
@pytest.mark.parametrize("lens_q", [[2, 1], [77, 200]], ids=["decode", "prefill"])
def test_head_dims_between_those_of_the_kernels(head_dim, lens_q, dtype):
    sequences = accuracy.make_sequences(lens_q, [5000, 333], 8, 2, head_dim, dtype, 13, FP8)
    for case in (accuracy.paged(sequences, 48, causal=True), accuracy.packed(sequences)):
        accuracy.check(case, *case.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
@every_head_dim
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_a_row_depends_on_nothing_else_in_the_batch(head_dim, layout, dtype):
    """With num_splits=1, and metadata where there are pages: alone, among strangers, and as the end of a chunk."""
    heads, heads_k = 8, 2
    decodes = accuracy.make_sequences([1] * 3, [4001, 17, 640], heads, heads_k, head_dim, dtype, 14, FP8)
    chunk = accuracy.make_sequences([700], [700], heads, heads_k, head_dim, dtype, 15, FP8)

    def last_rows(sequences):
        lens_q = [s[0].shape[0] for s in sequences]
        if layout == "packed":
            case = accuracy.packed(sequences, causal=True, num_splits=1)
        else:
            case = accuracy.paged(sequences, 16, causal=True, num_splits=1)
            case.kwargs["scheduler_metadata"] = get_scheduler_metadata(
                len(sequences), max(lens_q), max(s[1].shape[0] for s in sequences), heads, heads_k, head_dim,
                cu_seqlens_q=accuracy.starts(lens_q), total_q=sum(lens_q), seqused_k=case.kwargs["seqused_k"],
                causal=True, num_splits=1, page_size=16, kv_dtype=FP8, q_dtype=dtype,
            )  # fmt: skip
        out, lse = case.run()
        accuracy.check(case, out, lse)
        ends = torch.tensor(lens_q).cumsum(0) - 1
        return out[ends], lse[:, ends]

    together, lse = last_rows(decodes)
    mixed, mixed_lse = last_rows(decodes + chunk)
    assert torch.equal(mixed[:3], together) and torch.equal(mixed_lse[:, :3], lse)
    alone, _ = last_rows(decodes[:1])
    assert torch.equal(alone[0], together[0])
    q, k, v = chunk[0]
    token, _ = last_rows([(q[-1:], k, v)])
    assert torch.equal(token[0], mixed[3])


@every_kernel
@pytest.mark.parametrize("seqlen_q", [1, 70], ids=["decode", "prefill"])
def test_many_small_probabilities_add_up(dtype, seqlen_q):
    """One key far above 200,000 others, each of which has a 2^-25th of its weight: below what float16 has."""
    keys, d = 200_000, 128
    q = torch.zeros(1, seqlen_q, 2, d, device="cuda")
    k, v = torch.zeros(1, keys, 1, d, device="cuda"), torch.ones(1, keys, 1, d, device="cuda")
    q[..., 0], k[:, -1, :, 0], v[:, -1] = 14.0, 1.0, 0.0
    out, lse = flash_attn_func(q.to(dtype), k.to(FP8), v.to(FP8), softmax_scale=1.25, return_softmax_lse=True)
    others = (keys - 1) * math.exp(-17.5)
    torch.testing.assert_close(out.float(), torch.full_like(out.float(), others / (1 + others)), rtol=0.02, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 17.5 + math.log1p(others)), rtol=1e-5, atol=1e-4)


@every_kernel
def test_cache_append(dtype):
    sequences = accuracy.make_sequences([2] * 3, [502, 3, 66], 8, 2, 128, dtype, 6, FP8)
    case = accuracy.kvcache([(q, k[:-2], v[:-2]) for q, k, v in sequences], 600, causal=True)
    case.kwargs |= {
        "k": accuracy.joined(torch.stack, [k[-2:] for _, k, _ in sequences]),
        "v": accuracy.joined(torch.stack, [v[-2:] for _, _, v in sequences]),
    }
    case.sequences = sequences
    accuracy.check(case, *case.run())


@every_kernel
@pytest.mark.parametrize("seqlen_q", [1, 100])
def test_append_to_pages(seqlen_q, dtype):
    sequences = accuracy.make_sequences([seqlen_q] * 3, [n + seqlen_q for n in (500, 0, 63)], 8, 2, 128, dtype, 9, FP8)
    case = accuracy.kvcache_pages(sequences, 16, seqlen_q, causal=True)
    accuracy.check(case, *case.run())
    for cache, whole in zip(case.args[1:], accuracy.pages(sequences, 16), strict=False):
        torch.testing.assert_close(cache.float(), whole.float(), rtol=0, atol=0, equal_nan=True)


def test_decode_over_a_million_keys(large):
    case = accuracy.a_million_keys(1, 4, "paged", FP8, v_descale=torch.tensor(0.5, device="cuda"))
    accuracy.check_in_parts(case, *case.run())


@every_kernel
def test_the_reference_backend_on_the_gpu(dtype):
    sequences = accuracy.make_sequences([5, 1], [300, 77], 8, 2, 64, dtype, 7, FP8)
    case = accuracy.paged(sequences, 16, causal=True, k_descale=torch.tensor([0.5, 2.0], device="cuda"))
    accuracy.check(case, *case.run(backend="reference"))


@pytest.mark.parametrize(("dtype", "names"), [(torch.bfloat16, "kv"), (FP8, "qkv")], ids=["bf16", "fp8"])
def test_compiles_without_a_graph_break(dtype, names):
    sequences = accuracy.make_sequences([200, 77], [250, 77], 8, 2, 64, dtype, 8, FP8)
    case = accuracy.packed(sequences, causal=True, **{f"{x}_descale": torch.tensor(0.7, device="cuda") for x in names})
    expected, _ = case.run()
    torch._dynamo.reset()
    out = torch.compile(lambda *args: case.call(*args, **case.kwargs), fullgraph=True)(*case.args)
    assert torch.equal(out, expected)


def test_what_tma_cannot_walk_is_refused():
    q = torch.randn(1, 40, 4, 72, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="multiples of 16 up to 256"):
        flash_attn_func(q, q.to(FP8), q.to(FP8))
    k = torch.zeros(1, 40, 4, 72, device="cuda").to(FP8)[..., :64]
    with pytest.raises(ValueError, match="strides"):
        flash_attn_func(q[..., :64], k, k)
    with pytest.raises(ValueError, match="q: got strides"):
        flash_attn_func(k, k.contiguous(), k.contiguous())


def test_the_op_refuses_fp8_queries_that_it_has_no_kernel_for():
    q = torch.zeros(1, 40, 4, 64, device="cuda").to(FP8)
    lse = torch.empty(1, 4, 40, device="cuda")
    forward = torch.ops.lite_attention.fwd
    rest = (lse, None, None, None, None, None, 40, 40, 0.125, -1, -1)
    for keys, out in ((q, q.half()), (q.bfloat16(), q.bfloat16())):
        with pytest.raises(RuntimeError, match="out is bfloat16 where q is FP8"):
            forward(q, keys, keys, out, *rest)

"""The Hopper kernels against the plain formula in fp32, under the field's accuracy rule."""

from __future__ import annotations

import random as py_random

import accuracy
import pytest
import torch

HEADS = [(1, 1), (4, 4), (8, 2), (9, 3), (14, 2), (6, 1), (32, 8), (20, 1)]
MASKS = [
    {},
    {"causal": True},
    {"window_size": (37, 21)},
    {"causal": True, "window_size": (200, 0)},
    {"window_size": (-1, 50)},
    {"window_size": (0, 0)},
]
every_kernel = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_head_dim = pytest.mark.parametrize("head_dim", [64, 128])


def lengths(rng, n, longest):
    """Lengths on and off tile borders, zero among them."""
    return [rng.choice([0, 1, rng.randint(1, 40), rng.randint(1, longest), 128 * rng.randint(1, 4)]) for _ in range(n)]


@every_kernel
@every_head_dim
@pytest.mark.parametrize("layout", ["fixed", "packed", "paged", "kvcache"])
@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(layout, head_dim, dtype, seed):
    rng = py_random.Random(f"{layout} {head_dim} {dtype} {seed}")
    heads, heads_k = rng.choice(HEADS)
    mask = rng.choice(MASKS)
    batch = rng.randint(1, 5)
    decode = rng.random() < 0.4
    lens_q = [rng.randint(1, 8) for _ in range(batch)] if decode else lengths(rng, batch, 700)
    lens_k = lengths(rng, batch, 4000 if decode else 900)
    if layout in ("fixed", "kvcache"):
        lens_q = [max(lens_q[0], 1)] * batch
    if layout == "fixed":
        lens_k = [max(lens_k[0], 1)] * batch
    sequences = accuracy.make_sequences(lens_q, lens_k, heads, heads_k, head_dim, dtype, seed)
    kwargs = dict(mask)
    if rng.random() < 0.3:
        kwargs["softmax_scale"] = rng.choice([0.05, 0.3])
    if layout == "fixed":
        case = accuracy.fixed(sequences, **kwargs)
    elif layout == "packed":
        case = accuracy.packed(sequences, slack=rng.choice([0, 3, 130]), **kwargs)
    elif layout == "paged":
        page_size = rng.choice([16, 32, 48, 64, 80, 128, 256, 1024])
        case = accuracy.paged(sequences, page_size, by_head=rng.random() < 0.5, joined=rng.random() < 0.7, **kwargs)
    else:
        case = accuracy.kvcache(sequences, max(lens_k) + rng.randint(1, 200), **kwargs)
    accuracy.check(case, *case.run())


@every_kernel
@every_head_dim
@pytest.mark.parametrize("page_size", [16, 64, 128])
def test_long_decode_is_split_and_summed(head_dim, dtype, page_size):
    sequences = accuracy.make_sequences([1, 1, 1], [20001, 5, 7777], 8, 2, head_dim, dtype, 1)
    case = accuracy.paged(sequences, page_size, causal=True)
    first = case.run()
    accuracy.check(case, *first)
    for _ in range(5):  # parts arrive in any order, and are summed in one
        again = case.run()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@every_kernel
@every_head_dim
@pytest.mark.parametrize("causal", [False, True])
def test_many_items_are_dealt_whole(head_dim, dtype, causal):
    lens = [300, 1, 0, 900, 128, 511] * 4
    sequences = accuracy.make_sequences(lens, lens, 32, 32, head_dim, dtype, 2)
    case = accuracy.packed(sequences, slack=0, causal=causal)
    accuracy.check(case, *case.run())


@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 8, 16, 17, 64, 65])
@pytest.mark.parametrize("heads", [(8, 8), (16, 2), (12, 4), (128, 1), (71, 1), (200, 1)])
def test_packed_query_heads(head_dim, seqlen_q, heads):
    """Group sizes that do and don't divide the tile, and one that is larger than it."""
    sequences = accuracy.make_sequences([seqlen_q] * 2, [1000, 333], *heads, head_dim, torch.bfloat16, 3)
    case = accuracy.paged(sequences, 16, causal=True)
    accuracy.check(case, *case.run())


@every_head_dim
def test_strides(head_dim):
    """q, k and v as slices of one projection, out with strides of its own, and head-major storage."""
    d, heads, heads_k, n = head_dim, 8, 2, 300
    generator = torch.Generator("cuda").manual_seed(4)
    fused = accuracy.random(2, n, (heads + 2 * heads_k) * d, dtype=torch.bfloat16, generator=generator)
    q, k, v = (x.unflatten(-1, (-1, d)) for x in fused.split([heads * d, heads_k * d, heads_k * d], -1))
    sequences = list(zip(q, k, v, strict=True))
    out = accuracy.poisoned(2, heads, n, d + 8, dtype=torch.bfloat16).transpose(1, 2)[..., :d]
    case = accuracy.Case(accuracy.flash_attn_func, (q, k, v), {"causal": True, "out": out}, sequences)
    got, lse = case.run()
    assert got.data_ptr() == out.data_ptr()
    accuracy.check(case, got, lse)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    case = accuracy.Case(accuracy.flash_attn_func, tuple(by_head), {}, sequences)
    accuracy.check(case, *case.run())


def test_output_is_written_nowhere_else():
    """Rows past the batch's last query, and lse beyond them, keep what they had."""
    sequences = accuracy.make_sequences([5, 130], [77, 200], 6, 2, 64, torch.bfloat16, 5)
    case = accuracy.packed(sequences)
    padded_q = torch.cat([case.args[0], accuracy.poisoned(40, 6, 64, dtype=torch.bfloat16)])
    out = torch.full_like(padded_q, 7.0)
    case.args = (padded_q, *case.args[1:])
    got, lse = case.run(out=out)
    assert (got[135:] == 7.0).all()
    accuracy.check(case, got[:135], lse[:, :135])


def test_cache_append():
    sequences = accuracy.make_sequences([2] * 3, [500, 1, 64], 8, 2, 128, torch.bfloat16, 6)
    case = accuracy.kvcache(sequences, 600, causal=True)
    new = [
        accuracy.random(3, 2, 2, 128, dtype=torch.bfloat16, generator=torch.Generator("cuda").manual_seed(i))
        for i in (1, 2)
    ]
    case.kwargs |= {"k": new[0], "v": new[1]}
    case.sequences = [
        (q, torch.cat([k, new[0][b]]), torch.cat([v, new[1][b]])) for b, (q, k, v) in enumerate(sequences)
    ]
    accuracy.check(case, *case.run())


def test_cache_of_more_than_2_to_the_31_elements():
    heads_k, d, page_size = 8, 128, 16
    count = 2**31 // (page_size * heads_k * d) + 4096
    cache = torch.empty(count, page_size, heads_k, 2 * d, device="cuda", dtype=torch.bfloat16)
    k_cache, v_cache = cache[..., :d], cache[..., d:]
    sequences = accuracy.make_sequences([1], [1600], 32, heads_k, d, torch.bfloat16, 7)
    (_, k, v) = sequences[0]
    chosen = torch.arange(count - 100, count, device="cuda", dtype=torch.int32)
    k_cache[chosen.long()] = k.view(100, page_size, heads_k, d)
    v_cache[chosen.long()] = v.view(100, page_size, heads_k, d)
    args = (sequences[0][0], k_cache, v_cache, accuracy.starts([1]), None, 1, 1600)
    kwargs = {"seqused_k": accuracy.ints([1600]), "block_table": chosen[None], "causal": True}
    case = accuracy.Case(accuracy.flash_attn_varlen_func, args, kwargs, sequences)
    accuracy.check(case, *case.run())


def test_long_context():
    sequences = accuracy.make_sequences([3], [300_007], 4, 1, 128, torch.bfloat16, 8)
    case = accuracy.paged(sequences, 16, causal=True)
    accuracy.check(case, *case.run())


@pytest.mark.parametrize("layout", ["no batch", "no keys", "no keys used"])
def test_nothing_to_do(layout):
    if layout == "no batch":
        q = torch.empty(0, 5, 4, 64, device="cuda", dtype=torch.bfloat16)
        assert accuracy.flash_attn_func(q, q, q).shape == q.shape
        return
    if layout == "no keys":
        q, k = (torch.randn(2, n, 4, 64, device="cuda", dtype=torch.bfloat16) for n in (5, 0))
        out, lse = accuracy.flash_attn_func(q, k, k, return_softmax_lse=True)
    else:
        sequences = accuracy.make_sequences([3, 0], [0, 0], 4, 2, 64, torch.bfloat16, 9)
        out, lse = accuracy.packed(sequences, slack=1).run()
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


REFUSED = [
    ({"softcap": 3.0}, "softcap"),
    ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
    ({"sinks": torch.ones(4)}, "sinks"),
]


@pytest.mark.parametrize(("kwargs", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_what_the_kernel_lacks_is_refused_unless_the_reference_is_asked_for(kwargs, name):
    kwargs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    q = torch.randn(1, 9, 4, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=name):
        accuracy.flash_attn_func(q, q, q, **kwargs)
    assert accuracy.flash_attn_func(q, q, q, backend="reference", **kwargs).isfinite().all()


@pytest.mark.parametrize("change", ["head_dim", "dtype", "page_size"])
def test_unsupported_shapes_are_refused(change):
    d = 72 if change == "head_dim" else 64
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    sequences = accuracy.make_sequences([3], [40], 4, 2, d, dtype, 10)
    case = accuracy.paged(sequences, 8 if change == "page_size" else 16)
    with pytest.raises(NotImplementedError, match="Hopper"):
        case.run()


def test_strides_that_tma_cannot_walk_are_refused():
    q = torch.randn(1, 40, 4, 68, device="cuda", dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match="strides"):
        accuracy.flash_attn_func(q, q, q)

"""The Hopper kernels against the plain formula in fp32, under the field's accuracy rule."""

from __future__ import annotations

import math
import random as py_random

import accuracy
import pytest
import torch

from lite_attention import flash_attn_func, get_scheduler_metadata

HEADS = [(1, 1), (4, 4), (8, 2), (9, 3), (14, 2), (6, 1), (32, 8), (20, 1)]
MASKS = [
    {},
    {"causal": True},
    {"window_size": (37, 21)},
    {"causal": True, "window_size": (200, 0)},
    {"window_size": (-1, 50)},
    {"window_size": (0, 0)},
]
# The layouts of random calls, by the kind of tile that serves them: that of decode where there are few rows, else that
# of pages where keys are in pages or rows are computed whole, else one where there is no mask and one where there is.
LAYOUTS = {
    "decode": ("fixed", "packed", "paged", "kvcache"),
    "prefill": ("fixed", "packed", "kvcache"),
    "full": ("fixed", "packed", "kvcache"),
    "paged": ("paged", "packed", "paged", "kvcache"),
}
every_kernel = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
every_head_dim = pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])


def lengths(rng, n, longest):
    """Lengths on and off tile borders, zero among them."""
    return [rng.choice([0, 1, rng.randint(1, 40), rng.randint(1, longest), 128 * rng.randint(1, 4)]) for _ in range(n)]


def modifications(rng, heads, batch, likely=0.25):
    """Softcap, ALiBi slopes and sinks, each now and then."""
    floats = lambda *shape: torch.tensor([rng.random() for _ in range(math.prod(shape))], device="cuda").view(shape)  # noqa: E731
    kwargs = {}
    if rng.random() < likely:
        kwargs["softcap"] = rng.choice([1.0, 15.0, 50.0])
    if rng.random() < likely:
        kwargs["alibi_slopes"] = floats(*rng.choice([(heads,), (batch, heads)])) * 0.2
    if rng.random() < likely:
        kwargs["sinks"] = 6 * floats(heads) - 3
    return kwargs


def random_lengths(rng, tile, layout, group):
    """Of queries, so many that this kind of tile serves them, and of keys."""
    batch, most = rng.randint(1, 5), 64 // group  # queries of a sequence that are decode's
    if tile == "decode":
        lens_q = [rng.choice([1, rng.randint(1, min(most, 8)), rng.randint(0, most)]) for _ in range(batch)]
    else:
        lens_q = [rng.randint(most + 1, 700), *lengths(rng, batch - 1, 700)]
    lens_k = lengths(rng, batch, 4000 if tile == "decode" else 900)
    lens_q[0], lens_k[0] = max(lens_q[0], 1), max(lens_k[0], 1)
    if layout in ("fixed", "kvcache"):
        lens_q = lens_q[:1] * batch
    if layout == "fixed":
        lens_k = lens_k[:1] * batch
    return lens_q, lens_k


def random_case(rng, tile, modified, seed, head_dim, dtype, kv_dtype=None, scales=lambda rng, batch, heads_k: {}):
    """A call that this kind of tile serves: `modified` if with softcap or ALiBi slopes, as these have other kernels.

    `scales` gives it what FP8 has more.
    """
    layout, (heads, heads_k) = LAYOUTS[tile][seed % len(LAYOUTS[tile])], rng.choice(HEADS)
    lens_q, lens_k = random_lengths(rng, tile, layout, heads // heads_k)
    sequences = accuracy.make_sequences(lens_q, lens_k, heads, heads_k, head_dim, dtype, seed, kv_dtype)
    kwargs = dict(rng.choice({"full": MASKS[:1], "prefill": MASKS[1:]}.get(tile, MASKS)))
    more = modifications(rng, heads, len(lens_q), 0.5 if modified else 0.25)
    if not modified:
        more = {name: x for name, x in more.items() if name == "sinks"}
    elif not more.keys() & {"softcap", "alibi_slopes"}:
        more["softcap"] = 15.0
    kwargs |= more | scales(rng, len(lens_q), heads_k)
    if rng.random() < 0.3:
        kwargs["softmax_scale"] = rng.choice([0.05, 0.3])
    whole = rng.random() < 0.2 if tile == "decode" or layout == "paged" else tile == "paged"
    if whole:
        kwargs["num_splits"] = 1
    if layout == "fixed":
        return accuracy.fixed(sequences, **kwargs)
    if layout == "packed":
        return accuracy.packed(sequences, slack=rng.choice([0, 3, 130]), **kwargs)
    if layout == "kvcache":
        return accuracy.kvcache(sequences, max(lens_k) + rng.randint(1, 200), **kwargs)
    page_size = rng.choice([16, 32, 48, 64, 80, 128, 256, 1024])
    return accuracy.paged(sequences, page_size, by_head=rng.random() < 0.5, one_memory=rng.random() < 0.7, **kwargs)


@every_kernel
@every_head_dim
@pytest.mark.parametrize("modified", [False, True], ids=["plain", "modified"])
@pytest.mark.parametrize("tile", LAYOUTS)
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(tile, modified, head_dim, dtype, seed):
    rng = py_random.Random(f"{tile} {modified} {head_dim} {dtype} {seed}")
    case = random_case(rng, tile, modified, seed, head_dim, dtype)
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
    with accuracy.poisoned_scratch():
        assert first[0].new_empty(8).isnan().all()
        assert (first[0].new_empty(8, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        again = case.run()  # neither parts nor the plan are read where they were not written
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
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [5, 9, 13])
def test_what_full_rounds_leave_over_is_split(head_dim, causal, heads):
    """Items of like lengths that don't come out even: all workers share some of them, the others are taken whole."""
    lens_k = [16000] if causal else [6000, 6000]
    sequences = accuracy.make_sequences([2000] * len(lens_k), lens_k, heads, heads, head_dim, torch.bfloat16, 19)
    case = accuracy.packed(sequences, slack=0, causal=causal)
    first = case.run()
    accuracy.check(case, *first)
    for _ in range(3):
        again = case.run()
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 2, 4, 8, 16, 17, 64, 65])
@pytest.mark.parametrize("heads", [(8, 8), (16, 2), (12, 4), (128, 1), (71, 1), (200, 1)])
def test_packed_query_heads(head_dim, seqlen_q, heads):
    """Group sizes that do and don't divide the tile, and one that is larger than it."""
    sequences = accuracy.make_sequences([seqlen_q] * 2, [1000, 333], *heads, head_dim, torch.bfloat16, 3)
    case = accuracy.paged(sequences, 16, causal=True)
    accuracy.check(case, *case.run())


@every_head_dim
@pytest.mark.parametrize("max_seqlen_q", [1, 300])
@pytest.mark.parametrize("shared_metadata", [False, True], ids=["own-plan", "metadata"])
def test_max_seqlen_q_only_chooses_the_tile(head_dim, max_seqlen_q, shared_metadata):
    """As in a CUDA graph of vLLM's that serves decode steps and prefill: the tile of either computes both."""
    for lens_q, lens_k in (([300, 1, 0, 2], [1000, 700, 0, 2]), ([1, 1, 1, 1], [4000, 1, 129, 0])):
        sequences = accuracy.make_sequences(lens_q, lens_k, 8, 2, head_dim, torch.bfloat16, 18)
        case = accuracy.paged(sequences, 16, causal=True)
        q, k, v, starts, _, _, longest_k = case.args
        case.args = (q, k, v, starts, None, max_seqlen_q, longest_k)
        if shared_metadata:
            case.kwargs["scheduler_metadata"] = get_scheduler_metadata(
                4, max_seqlen_q, longest_k, 8, 2, head_dim, cu_seqlens_q=starts, total_q=len(q),
                seqused_k=case.kwargs["seqused_k"], causal=True, page_size=16,
            )  # fmt: skip
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


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("appended", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 3, 100])
def test_cache_of_pages(seqlen_q, appended, page_size, by_head):
    """flash_attn_with_kvcache over a block table. What is appended goes to its place, across pages, nowhere else."""
    new = seqlen_q if appended else 0
    lens_k = [n + new for n in (500, 0, 63, 1)]
    sequences = accuracy.make_sequences([seqlen_q] * 4, lens_k, 8, 2, 128, torch.bfloat16, 20)
    case = accuracy.kvcache_pages(sequences, page_size, new, causal=True, by_head=by_head)
    accuracy.check(case, *case.run())
    for cache, whole in zip(case.args[1:], accuracy.pages(sequences, page_size, by_head=by_head), strict=False):
        torch.testing.assert_close(cache, whole, rtol=0, atol=0, equal_nan=True)


@every_head_dim
@pytest.mark.parametrize("shared_metadata", [False, True], ids=["own-plan", "metadata"])
@pytest.mark.parametrize("lens_q", [[1, 2, 1, 1], [300, 0, 77, 5]], ids=["few", "many"])
def test_lengths_of_keys_in_pages_by_cu_seqlens_k(lens_q, shared_metadata, head_dim):
    """Where sequences would begin in packed keys says nothing over pages: only the differences count."""
    lens_k = [1000, 0, 333, 16]
    sequences = accuracy.make_sequences(lens_q, lens_k, 8, 2, head_dim, torch.bfloat16, 21)
    case = accuracy.paged(sequences, 16, causal=True)
    q, k, v, starts, _, longest_q, longest_k = case.args
    starts_k = accuracy.starts(lens_k) + 12345
    case.args = (q, k, v, starts, starts_k, longest_q, longest_k)
    del case.kwargs["seqused_k"]
    if shared_metadata:
        case.kwargs["scheduler_metadata"] = get_scheduler_metadata(
            4, longest_q, longest_k, 8, 2, head_dim, cu_seqlens_q=starts, total_q=len(q), cu_seqlens_k=starts_k,
            causal=True, page_size=16,
        )  # fmt: skip
    accuracy.check(case, *case.run())


def test_cache_of_more_than_2_to_the_31_elements(large):
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
    case = accuracy.Case(accuracy.flash_attn_varlen_func, args, kwargs, sequences, cached=True)
    accuracy.check(case, *case.run())


def dense_caches(batch, capacity, heads_k=8, d=128):
    """K and V (batch, capacity, heads_k, d) side by side in one memory of more than 2^31 elements, not initialised."""
    memory = torch.empty(batch, capacity, 2 * heads_k, d, device="cuda", dtype=torch.bfloat16)
    assert memory.numel() > 2**31
    return memory[:, :, :heads_k], memory[:, :, heads_k:]


def test_dense_cache_whose_rows_begin_past_2_to_the_31_elements(large):
    batch = 65
    k_cache, v_cache = dense_caches(batch, 2**14 + 256)
    assert (batch - 1) * k_cache.stride(0) > 2**31
    lens_k = [1 + 37 * b % 700 for b in range(batch)]
    for seqlen_q in (1, 70):
        sequences = accuracy.make_sequences([seqlen_q] * batch, lens_k, 32, 8, 128, torch.bfloat16, 22)
        for b, (_, k, v) in enumerate(sequences):
            for cache, x in ((k_cache, k), (v_cache, v)):
                cache[b, : len(x)], cache[b, len(x) : len(x) + 300] = x, torch.nan
        kwargs = {"cache_seqlens": accuracy.ints(lens_k), "causal": True}
        q = torch.stack([s[0] for s in sequences])
        case = accuracy.Case(accuracy.flash_attn_with_kvcache, (q, k_cache, v_cache), kwargs, sequences, cached=True)
        accuracy.check(case, *case.run())


def test_dense_cache_whose_last_tokens_lie_past_2_to_the_31_elements(large):
    """Through a window, so that only those are read."""
    capacity, tokens = 2**20 + 4096, 2048
    k_cache, v_cache = dense_caches(1, capacity)
    end = capacity - 5
    assert (end - tokens) * k_cache.stride(1) > 2**31
    for seqlen_q in (1, 300):
        sequences = accuracy.make_sequences([seqlen_q], [tokens], 32, 8, 128, torch.bfloat16, 23)
        ((q, k, v),) = sequences  # the end of the sequence, which is all that the window shows
        for cache, x in ((k_cache, k), (v_cache, v)):
            cache[0, end - tokens : end], cache[0, end:] = x, torch.nan
        kwargs = {"cache_seqlens": accuracy.ints([end]), "causal": True, "window_size": (1000, 0)}
        args = (q[None], k_cache, v_cache)
        case = accuracy.Case(accuracy.flash_attn_with_kvcache, args, kwargs, sequences, cached=True)
        accuracy.check(case, *case.run())


def test_long_context():
    sequences = accuracy.make_sequences([3], [300_007], 4, 1, 128, torch.bfloat16, 8)
    case = accuracy.paged(sequences, 16, causal=True)
    accuracy.check(case, *case.run())


@pytest.mark.parametrize("layout", ["paged", "kvcache"])
def test_decode_over_a_million_keys(layout, large):
    case = accuracy.a_million_keys(1, 4, layout)
    accuracy.check_in_parts(case, *case.run())


@pytest.mark.parametrize("layout", ["paged", "packed"])
def test_the_last_queries_of_a_million_keys(layout, large):
    case = accuracy.a_million_keys(300, 2, layout)
    accuracy.check_in_parts(case, *case.run())


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


@every_kernel
@every_head_dim
@pytest.mark.parametrize("lens_q", [[1, 1, 1], [5, 300, 0]], ids=["decode", "prefill"])
@pytest.mark.parametrize("modification", ["softcap", "alibi_slopes", "batch alibi_slopes", "sinks", "all"])
def test_score_modifications(modification, lens_q, head_dim, dtype):
    """Each alone and together, over rows that are split and rows that see nothing."""
    batch, heads = len(lens_q), 8
    generator = torch.Generator("cuda").manual_seed(11)
    slopes = torch.rand(batch, heads, device="cuda", generator=generator) * 0.1
    every = {"softcap": 20.0, "alibi_slopes": slopes[0], "sinks": 3 * torch.randn(heads, device="cuda")}
    kwargs = {modification: every[modification]} if modification in every else dict(every)
    if "batch" in modification:
        kwargs = {"alibi_slopes": slopes}
    sequences = accuracy.make_sequences(lens_q, [6001, 250, 0], heads, 2, head_dim, dtype, 12)
    case = accuracy.paged(sequences, 16, causal=True, **kwargs)
    accuracy.check(case, *case.run())


@every_kernel
@pytest.mark.parametrize("head_dim", [8, 40, 72, 104, 120, 136, 200, 248])
@pytest.mark.parametrize("lens_q", [[2, 1], [77, 200]], ids=["decode", "prefill"])
def test_head_dims_between_those_of_the_kernels(head_dim, lens_q, dtype):
    sequences = accuracy.make_sequences(lens_q, [5000, 333], 8, 2, head_dim, dtype, 13)
    for case in (accuracy.paged(sequences, 48, causal=True), accuracy.packed(sequences)):
        accuracy.check(case, *case.run())


@every_head_dim
@pytest.mark.parametrize("layout", ["packed", "paged", "paged with metadata"])
def test_a_row_depends_on_nothing_else_in_the_batch(head_dim, layout):
    """With num_splits=1: alone, among strangers, in a decode step and as the end of a chunk, the same bits."""
    heads, heads_k, page_size = 8, 2, 16
    lens_k = [4001, 17, 2500, 129, 640]
    decodes = accuracy.make_sequences([1] * 5, lens_k, heads, heads_k, head_dim, torch.bfloat16, 14)
    chunk = accuracy.make_sequences([700], [700], heads, heads_k, head_dim, torch.bfloat16, 15)

    def last_rows(sequences):
        if layout == "packed":
            case = accuracy.packed(sequences, causal=True, num_splits=1)
        else:
            case = accuracy.paged(sequences, page_size, causal=True, num_splits=1)
        if layout == "paged with metadata":
            lens_q = [s[0].shape[0] for s in sequences]
            case.kwargs["scheduler_metadata"] = get_scheduler_metadata(
                len(sequences), max(lens_q), max(s[1].shape[0] for s in sequences), heads, heads_k, head_dim,
                cu_seqlens_q=accuracy.starts(lens_q), total_q=sum(lens_q), seqused_k=case.kwargs["seqused_k"],
                causal=True, num_splits=1, page_size=page_size,
            )  # fmt: skip
        out, lse = case.run()
        accuracy.check(case, out, lse)
        ends = torch.tensor([s[0].shape[0] for s in sequences]).cumsum(0) - 1
        return out[ends], lse[:, ends]

    together, lse = last_rows(decodes)
    mixed, mixed_lse = last_rows(decodes + chunk)
    assert torch.equal(mixed[:5], together)
    assert torch.equal(mixed_lse[:, :5], lse)
    for b, sequence in enumerate(decodes):
        alone, lse_alone = last_rows([sequence])
        assert torch.equal(alone[0], together[b])
        assert torch.equal(lse_alone[:, 0], lse[:, b])
    q, k, v = chunk[0]
    token, lse_token = last_rows([(q[-1:], k, v)])
    assert torch.equal(token[0], mixed[5])
    assert torch.equal(lse_token[:, 0], mixed_lse[:, 5])


def test_scores_that_leap_far_above_the_running_max():
    """Keys whose scores lie hundreds above all before them: nothing overflows and the small ones vanish."""
    sequences = accuracy.make_sequences([64], [900], 4, 4, 64, torch.bfloat16, 16)
    q, k, v = sequences[0]
    k[100] = q[0] * 60  # keys are walked from the last to the first
    case = accuracy.fixed([(q, k, v)])
    accuracy.check(case, *case.run())


@every_kernel
@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_weights_of_single_keys(head_dim, dtype, seqlen_q):
    """Values that are unit vectors give the weights themselves, each as exact as two roundings, whoever raised it."""
    generator = torch.Generator("cuda").manual_seed(head_dim)
    keys = head_dim
    q, k = (torch.zeros(1, length, 1, head_dim, device="cuda", dtype=dtype) for length in (seqlen_q, keys))
    q[..., 0] = 1
    k[..., 0] = -4 * torch.rand(1, keys, 1, generator=generator, device="cuda").to(dtype)
    v = torch.eye(keys, device="cuda", dtype=dtype)[None, :, None]
    out = flash_attn_func(q, k, v, softmax_scale=1.0)
    exact = k[0, :, 0, 0].double().softmax(0)
    error = (out[0, :, 0].double() / exact - 1).abs().max()
    assert error < 1.05 * torch.finfo(dtype).eps  # one rounding is half of this at most


@every_kernel
@every_head_dim
@pytest.mark.parametrize("seqlen_q", [1, 300])
def test_a_nan_in_a_key_reaches_those_who_see_it(head_dim, dtype, seqlen_q):
    """In any column of a tile: a head each."""
    heads, first = 64, 100
    q, k, v = (torch.randn(1, n, heads, head_dim, device="cuda").to(dtype) for n in (seqlen_q, 300, 300))
    for head in range(heads):
        k[0, first + head, head, head_dim - 1] = torch.nan
    out = flash_attn_func(q, k, v, causal=True)
    rows = torch.arange(seqlen_q, device="cuda") + 300 - seqlen_q
    sees = rows[:, None] >= first + torch.arange(heads, device="cuda")
    assert (out[0].isnan().all(-1) == sees).all() and (out[0].isnan().any(-1) == sees).all()


@pytest.mark.parametrize("planted", [{"window_size": (-1, 1)}, {"window_size": (-1, 0), "softmax_scale": 0.1}])
def test_the_check_catches_what_is_planted(planted):
    """One key too many under the mask, or another scale: the rule that the kernels are held to tells."""
    sequences = accuracy.make_sequences([300], [300], 4, 2, 128, torch.bfloat16, 17)
    case, wrong = accuracy.packed(sequences, causal=True), accuracy.packed(sequences, **planted)
    with pytest.raises(AssertionError, match="error"):
        accuracy.check(case, *wrong.run())


def test_the_check_of_a_kv_cache_catches_errors_that_are_larger_everywhere():
    """1.7 times those of the formula: the largest is within its bound."""
    sequences = accuracy.make_sequences([8, 8], [500, 300], 8, 2, 128, torch.bfloat16, 26)
    case = accuracy.paged(sequences, 16, causal=True, softmax_scale=0.3)
    out, lse = case.run()
    accuracy.check(case, out, lse)
    worse = []
    for sequence in sequences:
        exact, plain = (
            accuracy.plain_attention(*tensors, 0.3, True, (-1, -1))[0]
            for tensors in ([x.float() for x in sequence], sequence)
        )
        worse.append((exact + 1.7 * (plain.float() - exact)).to(out.dtype))
    with pytest.raises(AssertionError, match="mean error"):
        accuracy.check(case, torch.cat(worse), lse)


@pytest.mark.parametrize("change", ["head_dim", "dtype", "page_size"])
def test_unsupported_shapes_are_refused(change):
    d = 68 if change == "head_dim" else 64
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    sequences = accuracy.make_sequences([3], [40], 4, 2, d, dtype, 10)
    case = accuracy.paged(sequences, 8 if change == "page_size" else 16)
    with pytest.raises(NotImplementedError, match="Hopper"):
        case.run()


@pytest.mark.parametrize("shared_metadata", [False, True], ids=["own-plan", "metadata"])
def test_a_batch_of_more_tiles_than_a_plan_can_count_is_refused(shared_metadata):
    """By the lengths that the host knows of, which may be large where keys are few: not where it knows of fewer."""
    batch, page_size, heads, heads_k, d = 260, 1 << 15, 8, 2, 128
    q, k, v = accuracy.make_sequences([batch], [100], heads, heads_k, d, torch.bfloat16, 25)[0]
    cache = accuracy.poisoned(1, page_size, heads_k, 2 * d, dtype=torch.bfloat16)
    cache[0, :100, :, :d], cache[0, :100, :, d:] = k, v
    table = torch.full((batch, page_size), accuracy.HUGE_PAGE, device="cuda", dtype=torch.int32)
    table[:, 0] = 0  # all have the same keys
    starts, used = accuracy.starts([1] * batch), accuracy.ints([100] * batch)

    def run(max_seqlen_k, window_size=(-1, -1)):
        kwargs = {"causal": True, "window_size": window_size, "seqused_k": used}
        if shared_metadata:
            kwargs["scheduler_metadata"] = get_scheduler_metadata(
                batch, 1, max_seqlen_k, heads, heads_k, d, cu_seqlens_q=starts, total_q=batch, page_size=page_size,
                **kwargs,
            )  # fmt: skip
        args = (q, cache[..., :d], cache[..., d:], starts, None, 1, max_seqlen_k)
        case = accuracy.Case(accuracy.flash_attn_varlen_func, args, kwargs | {"block_table": table})
        return case, *case.run()

    with pytest.raises(RuntimeError, match=r"max_seqlen_k: got 1073741824.* a batch split"):
        run(1 << 30)
    for how in ((1 << 20,), (1 << 30, (50, 0))):
        case, out, lse = run(*how)
        some = [0, 131, batch - 1]
        case.sequences = [(q[b : b + 1], k, v) for b in some]
        accuracy.check(case, out[some], lse[:, some])


def test_strides_that_tma_cannot_walk_are_refused():
    q = torch.randn(1, 40, 4, 68, device="cuda", dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match="strides"):
        accuracy.flash_attn_func(q, q, q)

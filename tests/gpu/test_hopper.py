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


@every_kernel
@every_head_dim
@pytest.mark.parametrize("layout", ["fixed", "packed", "paged", "kvcache"])
@pytest.mark.parametrize("seed", range(16))
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
    kwargs = dict(mask) | modifications(rng, heads, batch)
    if rng.random() < 0.3:
        kwargs["softmax_scale"] = rng.choice([0.05, 0.3])
    if rng.random() < 0.2:
        kwargs["num_splits"] = 1
    if layout == "fixed":
        case = accuracy.fixed(sequences, **kwargs)
    elif layout == "packed":
        case = accuracy.packed(sequences, slack=rng.choice([0, 3, 130]), **kwargs)
    elif layout == "paged":
        page_size = rng.choice([16, 32, 48, 64, 80, 128, 256, 1024])
        case = accuracy.paged(sequences, page_size, by_head=rng.random() < 0.5, one_memory=rng.random() < 0.7, **kwargs)
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


@pytest.mark.parametrize("change", ["head_dim", "dtype", "page_size"])
def test_unsupported_shapes_are_refused(change):
    d = 68 if change == "head_dim" else 64
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    sequences = accuracy.make_sequences([3], [40], 4, 2, d, dtype, 10)
    case = accuracy.paged(sequences, 8 if change == "page_size" else 16)
    with pytest.raises(NotImplementedError, match="Hopper"):
        case.run()


def test_strides_that_tma_cannot_walk_are_refused():
    q = torch.randn(1, 40, 4, 68, device="cuda", dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match="strides"):
        accuracy.flash_attn_func(q, q, q)

"""The reference and the CPU path of skip lists against an oracle that shares no code with them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from cases import LAYOUTS, Case, assert_close
from hypothesis import given, settings
from skip_cases import FILLS, WITH_LISTS, SkipCall, SkipCase, skip_cases

from lite_attention import SkipList, flash_attn_func, skip_attention, skip_attention_varlen
from lite_attention.skip import cpu

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@given(skip_cases())
@settings(max_examples=200)
def test_lists_and_outputs_are_the_oracles(backend, case):
    call = SkipCall(case)
    for _ in range(2):  # the second call starts from what the first left
        call.check(backend)


def case_of(layout="dense", fill="full", q_len=11, k_len=75, tile=(4, 2), thresholds=(-1.0,), **changes):
    """38 KV tiles, two words, the last of them partial; three q tiles, the last of them partial."""
    arguments = {
        "layout": layout,
        "q_lens": (q_len,) * 3,
        "k_lens": (k_len,) * 3 if layout == "dense" else (k_len, 0, 30),
        "heads_k": 2,
        "group": 2,
        "head_dim": 8,
        "page_size": 4,
        "dtype": torch.bfloat16,
        "causal": True,
        "window": (60, 2),
        "softcap": 0.0,
        "alibi": "",
        "sinks": True,
        "scale": 1.5,
        "seed": 1,
    }
    forced = {name: changes.pop(name, None) for name in ("must_do", "must_skip")}
    return SkipCase(case=Case(**(arguments | changes)), tile=tile, fill=fill, thresholds=thresholds, **forced)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fill", ["random", *FILLS])
def test_every_layout_and_fill(layout, fill, backend):
    ranges = (((0, 3), (40, 41)), (), ((29, 30),))
    skips = (((2, 33),), (), ((0, 30),))
    for forced in ({}, {"must_do": ranges}, {"must_skip": skips}, {"must_do": ranges, "must_skip": skips}):
        call = SkipCall(case_of(layout, fill, **forced))
        for _ in range(2):
            call.check(backend)


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (11, 75), (64, 128), (4, 5), (192, 25)])
@pytest.mark.parametrize("k_len", [1, 25, 74, 75])
def test_partial_tiles_and_odd_counts(tile, k_len, backend):
    for layout in ("dense", "paged"):
        SkipCall(case_of(layout, tile=tile, k_len=k_len, window=(-1, -1), causal=False)).check(backend)


def data(seqlen_q=150, seqlen_k=333, heads=4, heads_k=2, dtype=torch.float32, batch=2):
    """Scores that fall off from the last keys to the first, so that thresholds of a few bits leave some tiles out."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(batch, seqlen_q, heads, 32, generator=generator)
    k, v = (torch.randn(batch, seqlen_k, heads_k, 32, generator=generator) for _ in range(2))
    return q.to(dtype), (k * torch.linspace(0, 1, seqlen_k)[:, None, None]).to(dtype), v.to(dtype)


def random_list(tile=(32, 48), density=0.5, seqlen_q=150, seqlen_k=333, heads=4, batch=2):
    shape = (batch, heads, -(-seqlen_q // tile[0]), -(-seqlen_k // tile[1]))
    visits = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    return SkipList.from_visits(visits, tile, seqlen_q, seqlen_k)


def fresh(tile=(32, 48), seqlen_q=150, seqlen_k=333, heads=4, batch=2):
    return SkipList.fresh(batch, heads, seqlen_q, seqlen_k, tile=tile)


def dense_mask(skip_list):
    """The list as a mask of dense attention, (batch, heads, seqlen_q, seqlen_k)."""
    by_row = skip_list.visits().repeat_interleave(skip_list.block_m, 2)[:, :, : skip_list.max_seqlen_q]
    return by_row.repeat_interleave(skip_list.block_n, 3)[..., : skip_list.max_seqlen_k]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_output_is_that_of_masked_dense_attention(causal, density, dtype, backend):
    q, k, v = data(dtype=dtype)
    skip_list = random_list(density=density)
    mask = dense_mask(skip_list)
    if causal:
        mask = mask & (torch.arange(333) <= torch.arange(150)[:, None] + 333 - 150)
    out, lse = skip_attention(q, k, v, skip_list, -3.0, causal=causal, backend=backend)
    qh, kh, vh = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (qh @ kh.repeat_interleave(2, 1).mT / math.sqrt(32)).masked_fill(~mask, -math.inf)
    expected_lse = scores.logsumexp(-1)
    weights = (scores - expected_lse[..., None]).exp().nan_to_num(nan=0.0)
    expected = (weights @ vh.repeat_interleave(2, 1)).transpose(1, 2)
    assert mask.any(-1).all() == (density > 0.1), "only in the sparsest list some rows see nothing"
    epsilon = max(torch.finfo(dtype).eps, 1e-5)
    assert_close(out.double(), expected, rtol=epsilon, atol=epsilon)
    assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(32, 48), (7, 10)])
def test_a_threshold_of_minus_infinity_is_dense_attention(tile, dtype, causal, backend):
    """Bit for bit, whether the list is written or not, in tiles of any shape."""
    q, k, v = data(dtype=dtype)
    skip_list = fresh(tile)
    options = {"causal": causal, "window_size": (200, -1), "sinks": torch.tensor([0.5, -3.0, 0.0, 9.0])}
    expected = flash_attn_func(q, k, v, **options, return_softmax_lse=True, backend=backend)
    for threshold in (-math.inf, torch.tensor(-math.inf), torch.full((4,), -math.inf)):
        for update in (True, False):
            got = skip_attention(q, k, v, skip_list, threshold, **options, update=update, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
            assert skip_list.visits().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_minus_infinity_is_dense_attention_in_every_layout(layout, backend):
    call = SkipCall(case_of(layout, thresholds=(-math.inf,), q_len=1 if "paged" in layout else 11))
    got = call.run(backend)
    (call.function,) = (dense for dense, with_list in WITH_LISTS.items() if with_list is call.function)
    call.args = (*call.args[:3], *call.args[5:])
    call.kwargs = {name: x for name, x in call.kwargs.items() if name not in ("update", "must_do", "must_skip")}
    call.kwargs["return_softmax_lse"] = True
    for have, dense in zip(got, call.run(backend), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(have, dense, strict=True))


def test_a_sequence_is_dense_beside_one_that_skips(backend):
    q, k, v = data(dtype=torch.bfloat16)
    skip_list = fresh()
    skip_list.bits[1] = random_list().bits[1]
    got = skip_attention(q, k, v, skip_list, -2.0, backend=backend)
    dense = flash_attn_func(q, k, v, return_softmax_lse=True, backend=backend)
    for x, y in zip(got, dense, strict=True):
        assert torch.equal(x[0], y[0]) and not torch.equal(x[1], y[1])
    assert not skip_list.visits()[0].all(), "it votes all the same"


def test_higher_thresholds_keep_subsets(backend):
    q, k, v = data()
    kept = []
    for threshold in (-math.inf, -20.0, -8.0, -4.0, -2.0, -1.0, -0.5, 0.0):
        skip_list = fresh()
        skip_attention(q, k, v, skip_list, threshold, backend=backend)
        kept.append(skip_list.visits())
    for more, fewer in pairwise(kept):
        assert not (fewer & ~more).any()
    counts = [int(visits.sum()) for visits in kept]
    assert len(set(counts)) >= 5, counts


def test_each_head_has_its_threshold(backend):
    q, k, v = data()
    together, alone = fresh(), []
    thresholds = torch.tensor([-math.inf, -4.0, -1.0, 0.0])
    skip_attention(q, k, v, together, thresholds, backend=backend)
    for threshold in thresholds.tolist():
        skip_list = fresh()
        skip_attention(q, k, v, skip_list, threshold, backend=backend)
        alone.append(skip_list.visits())
    expected = torch.stack([visits[:, head] for head, visits in enumerate(alone)], dim=1)
    assert torch.equal(together.visits(), expected)


def staircase(heights):
    """One row, tiles of two keys, of which the larger scores `heights` of the tile."""
    k = torch.tensor([[height, height - 5.0] for height in heights]).view(1, -1, 1, 1)
    return torch.ones(1, 1, 1, 1), k, torch.ones_like(k)


@pytest.mark.parametrize(
    ("heights", "threshold", "stays"),
    [
        ([1, 2, 3, 4], 0.0, {3}),  # only the first visited tile
        ([4, 3, 2, 1], 0.0, {0, 1, 2, 3}),
        ([2, 4, 4, 2], 0.0, {2, 3}),  # as high as the running max is not above it
        ([7, 1, 5, 5, 6, 3], 0.0, {0, 4, 5}),
        ([1, 2, 3, 4], -1.5, {2, 3}),
        ([1, 2, 3, 4], -2.5, {1, 2, 3}),
        ([3, 9, 1, 8], -6.5, {0, 1, 3}),  # a tile that leaves doesn't lower the running max
        ([3], 0.0, {0}),
    ],
)
def test_which_tiles_stay(heights, threshold, stays, backend):
    q, k, v = staircase(heights)
    skip_list = SkipList.fresh(1, 1, 1, k.shape[1], tile=(1, 2))
    scale = 1 / math.log2(math.e)  # so that heights are in log2 units
    out, _ = skip_attention(q, k, v, skip_list, threshold, softmax_scale=scale, backend=backend)
    assert set(skip_list.visits()[0, 0, 0].nonzero().flatten().tolist()) == stays
    assert_close(out, torch.ones_like(out), rtol=1e-6, atol=1e-6)


def test_the_vote_is_of_raw_scores_times_the_scale(backend):
    """A scale of 1/2 halves the distance, so that the same threshold keeps more."""
    q, k, v = staircase([0, 1, 2, 3, 4])
    kept = []
    for scale in (0.25, 0.5, 1.0):
        skip_list = SkipList.fresh(1, 1, 1, 10, tile=(1, 2))
        skip_attention(q, k, v, skip_list, -1.5, softmax_scale=scale, backend=backend)
        kept.append(set(skip_list.visits()[0, 0, 0].nonzero().flatten().tolist()))
    assert kept == [{0, 1, 2, 3, 4}, {2, 3, 4}, {3, 4}]


def test_what_left_is_not_visited_again_until_reset(backend):
    q, k, v = data()
    skip_list = fresh()
    dense, _ = skip_attention(q, k, v, skip_list, -2.0, backend=backend)
    after = skip_list.visits()
    assert 0.1 < after.float().mean() < 0.9
    # Keys that now matter most, in tiles that have left in all heads: nothing reads them.
    gone = ~after.any(dim=1).any(dim=1)
    assert gone.any()
    tokens = gone.repeat_interleave(48, 1)[:, :333]
    poisoned = k.masked_fill(tokens[:, :, None, None], math.nan)
    sparse, _ = skip_attention(q, k, v, skip_list, -2.0, backend=backend)
    skip_list = SkipList.from_visits(after, (32, 48), 150, 333)
    again, _ = skip_attention(q, poisoned, v, skip_list, -2.0, backend=backend)
    assert torch.equal(again, sparse) and not torch.equal(sparse, dense)
    skip_list.reset()
    whole, _ = skip_attention(q, k, v, skip_list, -2.0, backend=backend)
    assert torch.equal(whole, dense) and torch.equal(skip_list.visits(), after)


def test_update_false_leaves_the_list(backend):
    q, k, v = data()
    lists = [random_list() for _ in range(2)]
    outs = [
        skip_attention(q, k, v, skip_list, -1.0, update=update, backend=backend)[0]
        for skip_list, update in zip(lists, (True, False), strict=True)
    ]
    assert torch.equal(*outs)
    assert torch.equal(lists[1].bits, random_list().bits)
    assert not torch.equal(lists[0].bits, lists[1].bits)


def test_must_do_brings_back_what_is_not_negligible(backend):
    q, k, v = staircase([9, 1, 8, 2, 5])
    visits = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    skip_list = SkipList.from_visits(visits, (1, 2), 1, 10)
    _, lse = skip_attention(q, k, v, skip_list, 0.0, softmax_scale=1.0, must_do=[(1, 3), (5, 6)], backend=backend)
    assert skip_list.visits().flatten().nonzero().flatten().tolist() == [0, 2]
    scores = torch.tensor([9.0, 4.0, 1.0, -4.0, 8.0, 3.0])
    assert_close(lse.flatten(), scores.logsumexp(0, keepdim=True), rtol=1e-6, atol=1e-6)


def test_must_skip_tiles_keep_their_bits(backend):
    q, k, v = data()
    skip_list = fresh()
    poisoned = k.clone()
    poisoned[:, 48:144] = math.nan
    out, _ = skip_attention(q, poisoned, v, skip_list, 0.0, must_skip=[(48, 191)], backend=backend)
    assert out.isfinite().all()
    assert skip_list.visits()[..., 1:3].all() and not skip_list.visits()[..., 0].all()
    assert not skip_list.visits()[..., 3].all(), "a tile that is only partly to be skipped is visited, and voted on"


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -3.0, 0.0, 9.0])])
def test_a_list_without_tiles_gives_zeros(sinks, backend):
    q, k, v = data()
    skip_list = random_list(density=0.0)
    out, lse = skip_attention(q, k, v, skip_list, -1.0, sinks=sinks, backend=backend)
    expected = torch.full((4,), -math.inf) if sinks is None else sinks
    assert (out == 0).all() and torch.equal(lse, expected[:, None].expand(2, 4, 150))
    assert not skip_list.visits().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_bad_values_reach_the_rows_that_see_them_and_no_other(poison, backend):
    q, k, v = data()
    clean, _ = skip_attention(q, k, v, random_list(), -1.0, causal=True, update=False, backend=backend)
    v[0, 320, 0] = poison
    out, _ = skip_attention(q, k, v, random_list(), -1.0, causal=True, update=False, backend=backend)
    sees = dense_mask(random_list())[0, :2, :, 320] & (torch.arange(150) + 333 - 150 >= 320)
    assert sees.any() and not sees.all()
    changed = ~torch.isclose(out, clean, rtol=1e-5, atol=1e-6).all(-1)
    assert torch.equal(changed[0, :, :2].T, sees) and not changed[1].any() and not changed[0, :, 2:].any()


def test_scores_without_a_value_have_no_say(backend):
    """NaN and -inf neither vote nor raise the running max, so that a bad key can't clear a list."""
    q, k, v = staircase([9, 9, 3, 5, 2])
    k[0, 4:6] = math.nan
    k[0, 8:] = -math.inf
    skip_list = SkipList.fresh(1, 1, 1, 10, tile=(1, 2))
    skip_attention(q, k, v, skip_list, 0.0, softmax_scale=1.0, backend=backend)
    assert skip_list.visits().flatten().tolist() == [False, True, False, True, True]
    only = torch.tensor([False, False, True, False, False]).view(1, 1, 1, 5)
    skip_list = SkipList.from_visits(only, (1, 2), 1, 10)
    skip_attention(q, k, v, skip_list, 0.0, softmax_scale=1.0, backend=backend)
    assert torch.equal(skip_list.visits(), only), "the first visited tile stays, whatever is in it"


def test_sequences_and_heads_have_lists_of_their_own(backend):
    """Varlen is each sequence alone with its entry of the list, in whichever order."""
    q, k, v = (x.flatten(0, 1) for x in data(batch=3))
    lengths_q, lengths_k = (150, 40, 97), (333, 100, 250)
    rows = [slice(150 * b, 150 * b + n) for b, n in enumerate(lengths_q)]
    keys = [slice(333 * b, 333 * b + n) for b, n in enumerate(lengths_k)]
    alone = random_list(batch=3)
    results = []
    for b in range(3):
        part = SkipList(alone.bits[b : b + 1].clone(), 32, 48, 150, 333)
        starts = (torch.tensor([0, n], dtype=torch.int32) for n in (lengths_q[b], lengths_k[b]))
        result = skip_attention_varlen(
            q[rows[b]], k[keys[b]], v[keys[b]], part, -1.0, *starts, 150, 333, causal=True, backend=backend
        )
        results.append((*result, part.bits))
    for order in ((0, 1, 2), (2, 0, 1)):
        skip_list = SkipList(random_list(batch=3).bits[list(order)], 32, 48, 150, 333)
        before = skip_list.bits.clone()
        starts = (
            torch.tensor([0, *(n[b] for b in order)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for n in (lengths_q, lengths_k)
        )
        packed = (torch.cat([x[part[b]] for b in order]) for x, part in ((q, rows), (k, keys), (v, keys)))
        out, lse = skip_attention_varlen(*packed, skip_list, -1.0, *starts, 150, 333, causal=True, backend=backend)
        stop = 0
        for place, b in enumerate(order):
            start, stop = stop, stop + lengths_q[b]
            assert_close(out[start:stop], results[b][0], rtol=1e-6, atol=1e-6)
            assert_close(lse[:, start:stop], results[b][1], rtol=1e-6, atol=1e-6)
            assert torch.equal(skip_list.bits[place], results[b][2][0])
        assert not torch.equal(skip_list.bits, before)


def test_the_cpu_path_multiplies_visited_tiles_only(monkeypatch):
    computed = 0
    average = cpu.average

    def counting(scores, *args):
        nonlocal computed
        computed += scores.numel()
        return average(scores, *args)

    monkeypatch.setattr(cpu, "average", counting)
    q, k, v = data(160, 480)
    skip_list = random_list(density=0.3, seqlen_q=160, seqlen_k=480)
    visits = int(skip_list.visits().sum())
    skip_attention(q, k, v, skip_list, -1.0)
    assert computed == visits * 32 * 48

"""The kernels with skip lists against the reference: lists bit for bit, outputs within the field's rule."""

from __future__ import annotations

import math
from itertools import pairwise

import accuracy
import pytest
import torch

from lite_attention import (
    SkipList,
    flash_attn_func,
    skip_attention,
    skip_attention_varlen,
    skip_attention_with_kvcache,
)
from lite_attention.skip.tiles import tile_shape

HEAD_DIMS = (64, 96, 128, 192, 256)
LOUD_RUN = 150  # keys
every_kernel = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def exact(lens_q, lens_k, heads, heads_k, d, dtype, seed):
    """Sequences of small integers, whose scores no order of summation rounds.

    Some runs of keys are loud, and most tiles without such keys leave the lists.
    """
    generator = torch.Generator(accuracy.DEVICE).manual_seed(seed)

    def draw(tokens, count, low, high):
        shape = (tokens, count, d)
        return torch.randint(low, high, shape, device=accuracy.DEVICE, generator=generator).to(dtype)

    sequences = []
    for sq, sk in zip(lens_q, lens_k, strict=True):
        loud = torch.rand(-(-sk // LOUD_RUN), 1, 1, device=accuracy.DEVICE, generator=generator) < 0.3
        loud = loud.repeat_interleave(LOUD_RUN, 0)[:sk]
        k = draw(sk, heads_k, -1, 2) * torch.where(loud, 4, 1).to(dtype)
        v = torch.randn(sk, heads_k, d, device=accuracy.DEVICE, generator=generator).to(dtype)
        sequences.append((draw(sq, heads, -1, 2), k, v))
    return sequences


def lists(batch, heads, max_q, max_k, d, keep, seed):
    """Two equal lists that visit about `keep` of all tiles."""
    fresh = SkipList.fresh(batch, heads, max_q, max_k, head_dim=d, device=accuracy.DEVICE)
    generator = torch.Generator(accuracy.DEVICE).manual_seed(seed)
    visits = torch.rand(fresh.visits().shape, device=accuracy.DEVICE, generator=generator) < keep
    tile = (fresh.block_m, fresh.block_n)
    return [SkipList.from_visits(visits, tile, max_q, max_k) for _ in range(2)]


def compare(call, skip_lists, threshold, **kwargs):
    """`call(skip_list, threshold, backend, ...)` by the kernel and by the reference."""
    out, lse = call(skip_lists[0], threshold, backend=None, **kwargs)
    expected, expected_lse = call(skip_lists[1], threshold, backend="reference", **kwargs)
    assert torch.equal(skip_lists[0].bits, skip_lists[1].bits)
    assert not out.isnan().any()
    rounding = 4 * torch.finfo(out.dtype).eps * expected.float().abs().max().clamp(min=1.0)
    assert (out.float() - expected.float()).abs().max() <= rounding
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)  # -inf where the reference has it, too
    return out, lse


def thresholds(heads, value, seed=0):
    """One a head, at no distance that integer scores can have."""
    generator = torch.Generator(accuracy.DEVICE).manual_seed(seed)
    return (value - 0.37 * torch.rand(heads, device=accuracy.DEVICE, generator=generator)).clamp(max=0.0)


@every_kernel
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("keep", [1.0, 0.4, 0.05, 0.0])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (300, 100)}])
@pytest.mark.parametrize(("sq", "sk"), [(700, 700), (1000, 3000), (5, 6001), (129, 177), (300, 100)])
def test_fixed_length(sq, sk, mask, keep, d, dtype):
    sequences = exact([sq] * 2, [sk] * 2, 4, 2, d, dtype, seed=sq)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(2, 4, sq, sk, d, keep, seed=sk)
    for _ in range(2):  # the second call walks what the first one left
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **mask, **kwargs), both, thresholds(4, -3.0))


@every_kernel
@pytest.mark.parametrize("d", [8, 40, 72, 104, 136, 200, 248])
def test_head_dims_between_those_of_the_kernels(d, dtype):
    sequences = exact([500], [1500], 4, 2, d, dtype, seed=d)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(1, 4, 500, 1500, d, 0.5, seed=d)
    compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, causal=True, **kwargs), both, thresholds(4, -2.0))


PATTERNS = {
    "even": lambda n, tiles: n % 2 == 0,
    "odd": lambda n, tiles: n % 2 == 1,
    "first": lambda n, tiles: n == 0,
    "one": lambda n, tiles: n == tiles // 2,
    "last": lambda n, tiles: n == tiles - 1,
}


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("mask", [{}, {"causal": True}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_alternating_and_single_tiles(pattern, mask, d):
    """Over two words of a list, and with other rows that visit nothing."""
    sq, sk = 700, 40 * tile_shape(d)[1] - 3
    sequences = exact([sq], [sk], 2, 2, d, torch.bfloat16, seed=d)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    fresh = SkipList.fresh(1, 2, sq, sk, head_dim=d, device=accuracy.DEVICE)
    visits = torch.zeros_like(fresh.visits())
    visits[...] = torch.tensor([PATTERNS[pattern](n, 40) for n in range(40)], device=accuracy.DEVICE)
    visits[:, 1, 1] = False
    both = [SkipList.from_visits(visits, (fresh.block_m, fresh.block_n), sq, sk) for _ in range(2)]
    for _ in range(2):
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **mask, **kwargs), both, thresholds(2, -3.0))


@every_kernel
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_a_threshold_of_zero(keep, d, dtype):
    """A tile as high as those before it leaves: scores are integers, many of them ties."""
    sequences = exact([300] * 2, [3000] * 2, 4, 2, d, dtype, seed=d)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    q[:, :, :2], k[..., 2:] = 0, 0  # heads without a score, and heads with few different ones
    k[:, 2000:] = k[:, 2000:].clamp(-1, 1)
    k[:, 0, :, :2] = 4  # which rows that saw no loud key before rise to
    both = lists(2, 4, 300, 3000, d, keep, seed=3)
    for each in both:
        each.bits[..., 0] |= 1
    before = both[0].visits().sum((0, 2, 3))
    for zero in (0.0, torch.zeros((), device=accuracy.DEVICE)):
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **kwargs), both, zero)
    visits = both[0].visits()
    assert (visits[:, :2].sum(-1) <= 1).all(), "without any rise only the first visited tile stays"
    assert (visits.sum((0, 2, 3)) < before).all() and (visits[:, 2:].sum(-1) > 1).any()


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_higher_thresholds_keep_subsets(d):
    sequences = exact([400], [3000], 4, 2, d, torch.bfloat16, seed=9)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    kept = []
    for value in (-math.inf, -20.0, -12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0):
        both = lists(1, 4, 400, 3000, d, 1.0, seed=0)
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **kwargs), both, thresholds(4, value))
        kept.append(both[0].visits())
    assert kept[0].all()
    for more, fewer in pairwise(kept):
        assert not (fewer & ~more).any()
    counts = [int(visits.sum()) for visits in kept]
    assert len(set(counts)) >= 4, counts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(("heads", "heads_k"), [(8, 2), (8, 1)])
def test_query_heads_that_share_keys(heads, heads_k, d, causal):
    """By fours and by eights, each with a list of its own."""
    sequences = exact([500] * 2, [1500] * 2, heads, heads_k, d, torch.bfloat16, seed=d)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(2, heads, 500, 1500, d, 0.5, seed=6)
    for _ in range(2):
        compare(
            lambda x, t, **kwargs: skip_attention(q, k, v, x, t, causal=causal, **kwargs), both, thresholds(heads, -3.0)
        )


@every_kernel
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [None, 16, 64, 176])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_sequences_of_many_lengths(d, page_size, causal, dtype):
    """Packed with poison after each sequence, or in pages with poison wherever no key is; lengths of zero too."""
    lens_q, lens_k = [300, 1, 0, 513], [900, 40, 200, 0]
    sequences = exact(lens_q, lens_k, 4, 2, d, dtype, seed=3)
    case = accuracy.paged(sequences, page_size) if page_size else accuracy.packed(sequences)
    q, k, v, *lengths = case.args
    both = lists(4, 4, lengths[2], lengths[3], d, 0.7, seed=1)
    kwargs = {name: case.kwargs[name] for name in ("seqused_k", "block_table") if name in case.kwargs}
    compare(
        lambda x, t, **more: skip_attention_varlen(q, k, v, x, t, *lengths, causal=causal, **kwargs, **more),
        both,
        thresholds(4, -2.0),
    )


@every_kernel
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [None, 48])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_key_caches(d, page_size, causal, dtype):
    """With poison after the keys of each sequence, of which one has none and one all that there is room for."""
    sq, lens_k = 150, [900, 40, 0, 1100]
    sequences = exact([sq] * 4, lens_k, 4, 2, d, dtype, seed=4)
    if page_size:
        q, used = torch.stack([x for x, _, _ in sequences]), accuracy.ints(lens_k)
        k_cache, v_cache, table = accuracy.pages(sequences, page_size)
        capacity, where = page_size * table.shape[1], {"block_table": table, "cache_seqlens": used}
    else:
        case = accuracy.kvcache(sequences, 1100)
        q, k_cache, v_cache = case.args
        capacity, where = 1100, case.kwargs
    both = lists(4, 4, sq, capacity, d, 0.7, seed=2)
    for _ in range(2):
        compare(
            lambda x, t, **kwargs: skip_attention_with_kvcache(
                q, k_cache, v_cache, x, t, causal=causal, **where, **kwargs
            ),
            both,
            thresholds(4, -2.0),
        )


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_forced_tiles_of_each_batch_entry(d):
    """Ranges of another number and place in each, none in the last; the same as masks."""
    ranges = {
        "must_do": [[(170, 360), (1500, 1501)], [(900, 1000)], []],
        "must_skip": [[(700, 1300)], [(0, 850), (1700, 2000)], []],
    }
    sequences = exact([500] * 3, [2000] * 3, 4, 2, d, torch.bfloat16, seed=5)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both, again = (lists(3, 4, 500, 2000, d, 0.4, seed=2) for _ in range(2))
    masks = {name: getattr(both[0], f"{name}_mask")(x) for name, x in ranges.items()}
    for _ in range(2):
        for each, forced in ((both, ranges), (again, masks)):
            compare(
                lambda x, t, forced=forced, **kwargs: skip_attention(q, k, v, x, t, **forced, **kwargs),
                each,
                thresholds(4, -1.0),
            )
    assert torch.equal(both[0].bits, again[0].bits)


def test_forced_tiles_and_sinks():
    sequences = exact([500, 500], [2000, 2000], 4, 2, 128, torch.bfloat16, seed=5)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(2, 4, 500, 2000, 128, 0.3, seed=2)
    forced = {"must_do": [(170, 360)], "must_skip": [(700, 1300), (1990, 2000)], "sinks": torch.randn(4, device="cuda")}
    for _ in range(2):
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **forced, **kwargs), both, thresholds(4, -1.0))


def test_a_list_that_is_not_to_change_does_not():
    sequences = exact([600], [2500], 2, 2, 128, torch.bfloat16, seed=6)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(1, 2, 600, 2500, 128, 0.5, seed=3)
    before = both[0].bits.clone()
    compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, update=False, **kwargs), both, thresholds(2, -0.5))
    assert torch.equal(both[0].bits, before)


@every_kernel
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("few", [44, 77])
def test_a_tile_stays_for_one_row_and_goes_for_none(few, d, dtype):
    """Even tiles are worth it to one row each, of all warps; the second tile of queries has `few` rows that are used.

    The last tile of keys, which comes first, is far above all others.
    """
    tile_m, tile_n = tile_shape(d)
    sq, tiles, far = tile_m + few, 24, 128.0
    q, k = (torch.zeros(1, n, h, d, device=accuracy.DEVICE, dtype=dtype) for n, h in ((sq, 4), (tiles * tile_n, 2)))
    q[..., 0], k[:, :-tile_n, :, 0] = 1.0, -far
    for n in range(0, tiles, 2):
        for first, rows in ((0, tile_m), (tile_m, few)):
            q[:, first + (5 + 23 * n) % rows, :, 1 + n] = 1.0
        up = far if n % 4 else 2 * far  # to the scores of the last tile, or above them
        k[:, n * tile_n + 7 * n % tile_n, :, 1 + n] = up
    generator = torch.Generator(accuracy.DEVICE).manual_seed(d)
    v = accuracy.random(*k.shape, dtype=dtype, generator=generator)
    both = lists(1, 4, sq, tiles * tile_n, d, 1.0, seed=0)
    stays = [n % 2 == 0 or n == tiles - 1 for n in range(tiles)]
    for _ in range(2):
        compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **kwargs), both, thresholds(4, -3.0))
        assert (both[1].visits() == torch.tensor(stays, device=accuracy.DEVICE)).all()


@every_kernel
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_first_tile_stays_though_nobody_scores(d, dtype):
    """Scores of -inf count as nothing seen: a tile of them alone stays where it is visited first, and only there."""
    sequences = exact([300], [3000], 4, 2, d, dtype, seed=d)
    q, k, v = (x[None] for x in sequences[0])
    both = lists(1, 4, 300, 3000, d, 0.5, seed=5)
    silent = torch.arange(both[0].kv_tiles, device=accuracy.DEVICE) % 2 == 1
    q[..., 0] = 1.0
    k[:, silent.repeat_interleave(both[0].block_n)[:3000], :, 0] = -math.inf
    for each in both:
        each.bits[..., 0] |= 1  # so that every row sees something
    visits = both[1].visits()
    first = visits & (visits.flip(-1).cumsum(-1).flip(-1) == 1)
    compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, **kwargs), both, thresholds(4, -3.0))
    assert torch.equal(both[1].visits() & silent, first & silent)
    assert 0 < (first & silent).sum() < (visits & silent).sum()


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_minus_infinity_is_dense_attention(d):
    q, k, v = (torch.randn(2, n, h, d, device="cuda").bfloat16() for n, h in ((900, 4), (1500, 2), (1500, 2)))
    skip_list = SkipList.fresh(2, 4, 900, 1500, head_dim=d, device="cuda")
    voted, untouched = (skip_attention(q, k, v, skip_list, -math.inf, update=update) for update in (True, False))
    assert (skip_list.bits == -1).all()
    for got, same, dense in zip(voted, untouched, flash_attn_func(q, k, v, return_softmax_lse=True), strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.float(), dense.float(), atol=4e-3, rtol=1e-2)


@every_kernel
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (300, 100)}])
@pytest.mark.parametrize("heads_k", [4, 2])
@pytest.mark.parametrize(("sq", "sk"), [(900, 1500), (20, 1500)])
@pytest.mark.parametrize("d", [64, 72, 96, 192])
def test_minus_infinity_is_dense_attention_bit_for_bit(d, sq, sk, heads_k, mask, dtype):
    """With num_splits=1 the dense kernel walks tiles of as many keys, rows in one part: the sums are the same ones.

    Not where the kernel is that for 128 or 256, whose lists have tiles of another width.
    """
    check_the_same_bits(d, sq, sk, heads_k, dtype, mask, num_splits=1)


@every_kernel
@pytest.mark.parametrize("heads_k", [4, 2])
@pytest.mark.parametrize("d", [104, 128])
def test_minus_infinity_is_small_dense_attention_bit_for_bit(d, heads_k, dtype):
    """Without a mask both have tiles of 176 keys, and the plan shares out no rows of an item of nine tiles: with fewer
    items than blocks that costs more than it saves (kPartsCost in csrc/sm90/plan.cu).
    """
    check_the_same_bits(d, 900, 1500, heads_k, dtype, {})


def check_the_same_bits(d, sq, sk, heads_k, dtype, mask, **dense):
    generator = torch.Generator(accuracy.DEVICE).manual_seed(d)
    q, k, v = (
        accuracy.random(2, n, h, d, dtype=dtype, generator=generator, spread=2.0)
        for n, h in ((sq, 4), (sk, heads_k), (sk, heads_k))
    )
    skip_list = SkipList.fresh(2, 4, sq, sk, head_dim=d, device=accuracy.DEVICE)
    got = skip_attention(q, k, v, skip_list, -math.inf, **mask)
    for x, y in zip(got, flash_attn_func(q, k, v, **mask, **dense, return_softmax_lse=True), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_many_items_for_each_block(d):
    """Long enough for blocks to take items dynamically, their lists of very different lengths."""
    sequences = exact([9000], [9000], 4, 4, d, torch.bfloat16, seed=7)
    q, k, v = (torch.stack(x) for x in zip(*sequences, strict=True))
    both = lists(1, 4, 9000, 9000, d, 0.2, seed=4)
    both[0].bits[:, :, ::3] = both[1].bits[:, :, ::3] = 0
    compare(lambda x, t, **kwargs: skip_attention(q, k, v, x, t, causal=True, **kwargs), both, thresholds(4, -2.0))

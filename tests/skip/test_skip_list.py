"""The list itself, its bits, and token ranges as masks of tiles, by exact sets."""

from __future__ import annotations

import pytest
import skip_oracle
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_attention import SkipList
from lite_attention.skip import bits, ranges
from lite_attention.skip.tiles import TILE_SHAPES, tile_shape


@given(st.lists(st.lists(st.booleans(), min_size=70, max_size=70), min_size=1, max_size=3), st.integers(0, 70))
def test_bits_are_where_the_kernels_look(rows, count):
    flags = torch.tensor(rows)[:, :count]
    packed = bits.pack(flags)
    assert packed.dtype == torch.int32 and packed.shape == (len(rows), -(-count // 32))
    for row, row_words in zip(flags.tolist(), packed.tolist(), strict=True):
        for n in range(len(row_words) * 32):
            assert row_words[n // 32] >> n % 32 & 1 == (n < count and row[n])
    assert torch.equal(bits.unpack(packed, count), flags)


@pytest.mark.parametrize(
    ("head_dim", "shape"),
    [(64, (192, 128)), (96, (128, 128)), (128, (128, 176)), (192, (128, 112)), (256, (128, 64))],
)
def test_tiles_are_those_of_the_next_larger_kernel(head_dim, shape):
    smaller = max((d for d in TILE_SHAPES if d < head_dim), default=0)
    assert {tile_shape(d) for d in range(smaller + 1, head_dim + 1)} == {shape}


@pytest.mark.parametrize("head_dim", [0, -8, 257])
def test_head_dims_without_a_kernel(head_dim):
    with pytest.raises(ValueError, match=f"head_dim: got {head_dim}; needs 1 to 256"):
        tile_shape(head_dim)


def test_a_fresh_list_visits_everything():
    skip_list = SkipList.fresh(2, 3, 385, 75600, head_dim=128)
    assert (skip_list.block_m, skip_list.block_n) == (128, 176)
    assert (skip_list.q_tiles, skip_list.kv_tiles) == (4, 430)
    assert skip_list.bits.shape == (2, 3, 4, 14) and skip_list.bits.dtype == torch.int32
    assert (skip_list.bits == -1).all() and skip_list.bits.is_contiguous()
    assert skip_list.visits().shape == (2, 3, 4, 430) and skip_list.visits().all()
    assert skip_list.nbytes == 2 * 3 * 4 * 14 * 4


def test_a_list_for_a_video_is_small():
    assert SkipList.fresh(1, 40, 75600, 75600, head_dim=128, device="meta").nbytes < 4 * 2**20


def test_reset_writes_in_place():
    skip_list = SkipList.from_visits(torch.zeros(1, 2, 3, 40, dtype=torch.bool), (4, 5), 12, 200)
    memory = skip_list.bits
    skip_list.reset()
    assert skip_list.bits is memory and skip_list.visits().all()


def test_lists_from_bools_and_back():
    visits = torch.rand(2, 3, 4, 65) < 0.5
    skip_list = SkipList.from_visits(visits, (8, 16), 32, 1030)
    assert torch.equal(skip_list.visits(), visits)
    assert (skip_list.block_m, skip_list.block_n) == (8, 16)
    skip_list.visits().zero_()
    assert torch.equal(skip_list.visits(), visits), "visits() is a copy"


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_lists_of_nothing(lengths):
    skip_list = SkipList.fresh(2, 3, *lengths, tile=(4, 4))
    assert skip_list.visits().shape == (2, 3, *(-(-n // 4) for n in lengths))
    assert skip_list.must_do_mask([(0, 0)]).shape == skip_list.must_skip_mask([]).shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipList.fresh(1, 2, 8, 8), "tile: got None, with head_dim=None; needs one of them"),
        (lambda: SkipList.fresh(1, 2, 8, 8, head_dim=64, tile=(4, 4)), r"tile: got \(4, 4\), with head_dim=64"),
        (lambda: SkipList.fresh(1, 2, 8, 8, head_dim=300), "head_dim: got 300"),
        (lambda: SkipList.fresh(-1, 2, 8, 8, head_dim=64), "batch: got -1"),
        (lambda: SkipList.fresh(1, 2.0, 8, 8, head_dim=64), "num_heads: got 2.0"),
        (lambda: SkipList.fresh(1, 2, -8, 8, head_dim=64), "max_seqlen_q: got -8"),
        (lambda: SkipList.fresh(1, 2, 8, torch.tensor(8), head_dim=64), "max_seqlen_k: got a tensor"),
        (lambda: SkipList.fresh(1, 2, 8, 8, tile=(0, 4)), "block_m: got 0; needs an int of 1 or more"),
        (lambda: SkipList.fresh(1, 2, 8, 8, tile=(4, 4.0)), "block_n: got 4.0; needs an int of 1 or more"),
        (
            lambda: SkipList.from_visits(torch.ones(1, 2, 2, 3, dtype=torch.bool), (4, 4), 8, 8),
            r"visits: got torch.bool of \(1, 2, 2, 3\); needs torch.bool of \(batch, num_heads, 2, 2\)",
        ),
        (lambda: SkipList.from_visits(torch.ones(1, 2, 2, 2), (4, 4), 8, 8), "visits: got torch.float32"),
        (lambda: SkipList(torch.zeros(1, 2, 2, 1), 4, 4, 8, 8), "skip_list: got torch.float32; needs torch.int32"),
        (
            lambda: SkipList(torch.zeros(1, 2, 3, 1, dtype=torch.int32), 4, 4, 8, 8),
            r"skip_list: got shape \(1, 2, 3, 1\); needs \(batch, num_heads, 2, 1\)",
        ),
    ],
)
def test_lists_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def tiles(mask, count=10):
    """The tiles of a mask, by entry."""
    return [set(entry.nonzero().flatten().tolist()) for entry in bits.unpack(mask, count)]


@pytest.mark.parametrize(
    ("ranges", "do", "skip"),
    [
        ([(0, 10)], {0}, {0}),
        ([(0, 11)], {0, 1}, {0}),
        ([(0, 9)], {0}, set()),
        ([(9, 10)], {0}, set()),
        ([(10, 11)], {1}, set()),
        ([(10, 30)], {1, 2}, {1, 2}),
        ([(9, 31)], {0, 1, 2, 3}, {1, 2}),
        ([(11, 29)], {1, 2}, set()),
        ([(90, 97)], {9}, {9}),  # the last tile has only 7 tokens
        ([(91, 97)], {9}, set()),
        ([(80, 96)], {8, 9}, {8}),
        ([(0, 97)], set(range(10)), set(range(10))),
        ([(5, 5)], set(), set()),
        ([(20, 20)], set(), set()),
        ([], set(), set()),
        ([(0, 5), (5, 10)], {0}, {0}),  # which neither covers alone
        ([(0, 7), (3, 10)], {0}, {0}),
        ([(0, 4), (5, 10)], {0}, set()),
        ([(40, 60), (0, 10), (45, 47)], {0, 4, 5}, {0, 4, 5}),
    ],
)
def test_ranges_round_to_these_tiles(ranges, do, skip):
    """97 keys in tiles of 10: must_do rounds outward, must_skip inward."""
    skip_list = SkipList.fresh(2, 1, 4, 97, tile=(4, 10))
    for given_ranges in (
        ranges,
        tuple(ranges),
        [ranges, ranges],
        torch.tensor([[*ranges, (0, 0)]] * 2, dtype=torch.int32),
    ):
        assert tiles(skip_list.must_do_mask(given_ranges)) == [do] * 2
        assert tiles(skip_list.must_skip_mask(given_ranges)) == [skip] * 2


def test_each_entry_has_its_ranges():
    skip_list = SkipList.fresh(3, 1, 4, 97, tile=(4, 10))
    ranges = [[(0, 10), (95, 97)], [], [(30, 55)]]
    padded = torch.tensor([[(0, 10), (95, 97)], [(0, 0), (7, 7)], [(30, 55), (97, 97)]], dtype=torch.int32)
    for given_ranges in (ranges, padded, padded.transpose(0, 1).contiguous().transpose(0, 1)):
        assert tiles(skip_list.must_do_mask(given_ranges)) == [{0, 9}, set(), {3, 4, 5}]
        assert tiles(skip_list.must_skip_mask(given_ranges)) == [{0}, set(), {3, 4}]


@given(
    st.integers(0, 400),
    st.integers(1, 12),
    st.lists(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=4), min_size=2, max_size=2),
)
def test_masks_are_the_oracles(seqlen_k, block_n, entries):
    ranges = [[tuple(sorted((min(a, seqlen_k), min(b, seqlen_k)))) for a, b in entry] for entry in entries]
    skip_list = SkipList.fresh(2, 1, 4, seqlen_k, tile=(4, block_n))
    for mask, rounding in ((skip_list.must_do_mask, "outward"), (skip_list.must_skip_mask, "inward")):
        got = mask(ranges)
        assert got.dtype == torch.int32 and got.is_contiguous() and got.shape == (2, skip_list.bits.shape[3])
        assert tiles(got, skip_list.kv_tiles) == [
            skip_oracle.forced(entry, seqlen_k, block_n, rounding) for entry in ranges
        ]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (3, r"got 3; needs \(begin, end\) pairs"),
        ([1, 2], r"got \[1, 2\]; needs \(begin, end\) pairs"),
        ([(1, 2), [(3, 4)]], "pairs for all batch entries"),
        ([(1, 2, 3)], r"got \(1, 2, 3\)"),
        ([(1.0, 2)], r"got \(1.0, 2\)"),
        ([(5, 4)], r"got \(5, 4\); needs 0 <= begin <= end <= 97"),
        ([(-1, 4)], r"got \(-1, 4\)"),
        ([(0, 98)], r"got \(0, 98\)"),
        ([[(0, 9)]], "got ranges for 1 entries; needs ranges for each of the 2 of the batch"),
        (torch.zeros(3, 1, 2, dtype=torch.int32), r"got shape \(3, 1, 2\); needs \(2, n, 2\)"),
        (torch.zeros(2, 1, 2), "got torch.float32; needs torch.int32"),
        (torch.tensor([[[0, 9]], [[3, 98]]], dtype=torch.int32), r"got \(3, 98\)"),
    ],
)
def test_ranges_that_cannot_be(ranges, message):
    skip_list = SkipList.fresh(2, 1, 4, 97, tile=(4, 10))
    for name, mask in (("must_do", skip_list.must_do_mask), ("must_skip", skip_list.must_skip_mask)):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            mask(ranges)


def test_what_is_not_read_is_cut_off(monkeypatch):
    """A tensor on a GPU is not checked; ranges of no tokens take none from the others."""
    monkeypatch.setattr(ranges, "readable", lambda x: False)
    skip_list = SkipList.fresh(1, 1, 4, 97, tile=(4, 10))
    pairs = torch.tensor([[(0, 20), (15, 3), (85, 200), (-7, -3), (300, 400)]], dtype=torch.int32)
    assert tiles(skip_list.must_do_mask(pairs)) == [{0, 1, 8, 9}]
    assert tiles(skip_list.must_skip_mask(pairs)) == [{0, 1, 9}]

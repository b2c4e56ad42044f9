"""A decode step in one call: what the three calls give, in all that they write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import UNWRITTEN
from hypothesis import given
from hypothesis import strategies as st
from page_cases import HUGE, PageCase, Step, page_cases, sets_of

from lite_attention.pages import PageLists, write_sketch

BACKENDS = ("cpu", "reference")
LONG = PageCase(q_lens=(1, 3), k_lens=(1000, 700), eps=0.2, sharp=1.5)


def fresh(step):
    """Lists and out, of which all must be written that is to be read."""
    case, blocks = step.case, step.block_table.shape[1]
    lists = PageLists.empty(len(case.k_lens), case.heads_k, step.q.shape[1], blocks, torch.device("cpu"))
    for x in (lists.bits, lists.indices, lists.counts):
        x.fill_(HUGE)
    lists.left_out.fill_(torch.nan)
    return lists, torch.full_like(step.q, UNWRITTEN)


def some_pages(step):
    """Every other full page, with padding, and with one of them twice."""
    full = [step.block_table[b, : k_len // 16 : 2] for b, k_len in enumerate(step.case.k_lens)]
    pages = torch.cat([torch.tensor([-1, -HUGE], dtype=torch.int32), *full])
    return torch.cat([pages, pages[-1:]])


def three_calls(step, pages, backend, whole=None, **changes):
    lists, out = fresh(step)
    write_sketch(step.k_cache, step.sketch, pages, backend=backend)
    step.select(lists=lists, whole=whole, backend=backend, **changes)
    out, lse = step.attend(lists, out=out, backend=backend)
    return lists, out, lse


def same(step, lists, out, lse, expected):
    rows = slice(0, sum(step.case.q_lens))
    expected_lists, expected_out, expected_lse = expected
    assert sets_of(lists) == sets_of(expected_lists)
    for name in ("bits", "counts", "left_out"):
        assert torch.equal(getattr(lists, name), getattr(expected_lists, name)), name
    assert torch.equal(out, expected_out)
    assert torch.equal(lse[:, rows], expected_lse[:, rows])


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=page_cases(), marks=st.lists(st.booleans(), min_size=3, max_size=3), some=st.booleans())
def test_it_is_the_three_calls(backend, case, marks, some):
    step = Step(case)
    pages, written = some_pages(step), step.sketch.clone()
    whole = torch.tensor(marks[: len(case.k_lens)]) if some else None
    step.sketch[pages[pages >= 0].long()] = 255
    expected = three_calls(step, pages, backend, whole)
    assert torch.equal(step.sketch, written)
    step.sketch[pages[pages >= 0].long()] = 255
    lists, out = fresh(step)
    result, lse, made = step.decode(filled=pages, whole=whole, lists=lists, out=out, backend=backend)
    assert result is out and made is lists
    assert torch.equal(step.sketch, written)
    same(step, lists, out, lse, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_pages_that_fill_no_sketch_is_written(backend):
    step = Step(LONG)
    expected = three_calls(step, step.block_table[0, :0], backend)
    before = step.sketch.clone()
    out, lse, lists = step.decode(backend=backend)
    assert torch.equal(step.sketch, before)
    rows = slice(0, 4)
    assert torch.equal(out[rows], expected[1][rows]) and torch.equal(lse[:, rows], expected[2][:, rows])
    assert torch.equal(lists.counts, expected[0].counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_page_that_fills_is_read_by_its_new_sketch(backend):
    """It is the step's own: with the sketch that was there before, the lists are others."""
    step = Step(replace(LONG, newest=1))
    pages = step.block_table[0, 1:60]
    expected = step.select().listed()
    step.sketch[pages.long()] = step.sketch[pages.flip(0).long()]
    assert not torch.equal(step.select().listed(), expected)
    assert torch.equal(step.decode(filled=pages, backend=backend)[2].listed(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_fill_are_written_where_there_are_no_queries(backend):
    step = Step(replace(LONG, q_lens=(0, 0)))
    written = step.sketch.clone()
    pages = some_pages(step)
    step.sketch[pages[pages >= 0].long()] = 255
    _, _, lists = step.decode(filled=pages, backend=backend)
    assert torch.equal(step.sketch, written)
    assert not lists.counts.any() and not lists.left_out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_left_out_all_pages_count(backend):
    step = Step(LONG)
    for changes in ({"eps": 0.0}, {"min_context": 1001}, {"whole": torch.ones(2, dtype=torch.bool)}):
        lists = step.decode(backend=backend, **changes)[2]
        assert lists.counts.tolist() == [[63, 63], [44, 44]] and not lists.left_out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_plan_is_read(backend):
    step = Step(LONG)
    expected = step.decode(backend=backend)
    garbage = torch.full((7,), HUGE, dtype=torch.int32)
    out, lse, lists = step.decode(backend=backend, scheduler_metadata=garbage)
    assert torch.equal(out[:4], expected[0][:4]) and torch.equal(lse[:, :4], expected[1][:, :4])
    assert torch.equal(lists.bits, expected[2].bits) and (garbage == HUGE).all()

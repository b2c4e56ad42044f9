"""Attention over listed pages: the exact softmax over their keys, and nothing of the others."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from cases import UNWRITTEN, assert_close
from hypothesis import given
from hypothesis import strategies as st
from page_cases import FP8, HUGE, PageCase, Step, page_cases, sets_of

from lite_attention import flash_attn_varlen_func
from lite_attention.pages import PAGE, PageLists

BACKENDS = ("cpu", "reference")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LONG = PageCase(q_lens=(1, 3), k_lens=(1000, 700), eps=0.2, sharp=1.5)


def some_lists(step, seed, share):
    """Any lists that have the pages of several query tokens, their unused entries hostile."""
    case, make = step.case, torch.Generator().manual_seed(seed)
    blocks, heads = step.block_table.shape[1], step.q.shape[1]
    lists = PageLists.empty(len(case.k_lens), case.heads_k, heads, blocks, torch.device("cpu"))
    lists.indices.fill_(HUGE)
    for b, (q_len, k_len) in enumerate(zip(case.q_lens, case.k_lens, strict=True)):
        listed = torch.rand(case.heads_k, -(-k_len // PAGE), generator=make) < share
        if q_len > 1:
            listed[:, max(k_len - q_len, 0) // PAGE :] = True
        lists.write(b, listed)
    return lists


def poison(step, lists):
    """NaN in every key and value that no list has of a head."""
    sets = sets_of(lists)
    for cache in (step.k_cache, step.v_cache):
        kept = torch.full(cache.shape, torch.nan).to(cache.dtype)
        for b, of_heads in enumerate(sets):
            for head, listed in enumerate(of_heads):
                for page in step.block_table[b, sorted(listed)].tolist():
                    kept[page, :, head] = cache[page, :, head]
        cache.copy_(kept)


@given(page_cases(), st.integers(0, 2**31), st.sampled_from((0.0, 0.3, 0.8, 1.0)))
def test_out_and_lse_are_the_oracles(case, seed, share):
    step = Step(case)
    lists = some_lists(step, seed, share)
    sets, tolerance = sets_of(lists), TOLERANCE[case.dtype]
    k_and_v = [step.keys(b) for b in range(len(case.k_lens))]
    poison(step, lists)
    for backend in BACKENDS:
        out = torch.full_like(step.q, UNWRITTEN)
        result, lse = step.attend(lists, out=out, backend=backend)
        assert result is out and (out[sum(case.q_lens) :] == UNWRITTEN).all()
        for b, (k, v) in enumerate(k_and_v):
            rows = step.rows(b)
            expected, expected_lse = oracle.attention(
                step.q[rows],
                k,
                v.nan_to_num(0.0),
                scale=step.scale,
                causal=True,
                window=(-1, -1),
                sinks=step.sinks,
                visits=lambda head, i, j, b=b: j // PAGE in sets[b][head // case.group],
            )
            assert_close(out[rows].double(), expected, rtol=tolerance, atol=tolerance)
            assert_close(lse[:, rows].double(), expected_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fp8", [None, ("batch", "heads_k")])
def test_with_all_pages_listed_it_is_dense_attention(backend, fp8):
    step = Step(replace(LONG, fp8=fp8, sinks=True))
    out, lse = step.attend(step.select(eps=0), backend=backend)
    dense, dense_lse = flash_attn_varlen_func(
        step.q,
        step.k_cache,
        step.v_cache,
        step.cu_seqlens_q,
        None,
        3,
        1000,
        causal=True,
        sinks=step.sinks,
        seqused_k=step.seqused_k,
        block_table=step.block_table,
        k_descale=step.k_descale,
        v_descale=step.v_descale,
        return_softmax_lse=True,
        backend="reference",
    )
    assert_close(out[:4], dense[:4], rtol=1e-5, atol=1e-5)
    assert_close(lse[:, :4], dense_lse[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_reads_what_is_listed_and_misses_little(backend):
    """With a budget the answer stays near dense, and pages that no list has may hold anything."""
    step = Step(replace(LONG, eps=0.05))
    dense, dense_lse = step.attend(step.select(eps=0), backend=backend)
    lists = step.select()
    assert int(lists.counts.sum()) < 0.9 * 2 * (63 + 44)
    poison(step, lists)
    out, lse = step.attend(lists, backend=backend)
    left_out = 1 - (lse - dense_lse)[:, :4].exp()
    assert (left_out > -1e-5).all() and 0.01 < left_out.max() < 0.1
    assert (out - dense)[:4].norm() < 0.2 * dense[:4].norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_does_not_depend_on_the_rest_of_the_batch(backend):
    step = Step(LONG)
    lists = step.select()
    out, lse = step.attend(lists, backend=backend)
    alone = Step(LONG)
    alone.q, alone.cu_seqlens_q = step.q[1:4], torch.tensor([0, 3], dtype=torch.int32)
    alone.seqused_k, alone.block_table = step.seqused_k[1:], step.block_table[1:]
    one = PageLists(lists.bits[1:], lists.indices[1:], lists.counts[1:], lists.left_out[1:])
    single, single_lse = alone.attend(one, backend=backend)
    assert torch.equal(single, out[1:4]) and torch.equal(single_lse, lse[:, 1:4])


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_nan_in_the_unused_end_of_a_page(backend):
    step = Step(PageCase(q_lens=(1,), k_lens=(17,), fp8=()))
    page = int(step.block_table[0, 1])
    assert step.v_cache.dtype == FP8 and step.v_cache[page, 1:].float().isnan().all()
    out, lse = step.attend(step.select(), backend=backend)
    assert out[:1].isfinite().all() and lse[:, :1].isfinite().all()

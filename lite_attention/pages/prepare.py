"""Turns the arguments of the public functions into a checked call, or raises; by metadata, which never waits."""

from __future__ import annotations

import math

from torch import Tensor

from lite_attention.checks import check_inference, check_operand, is_number, prepare, wrong
from lite_attention.pages.checks import (
    as_factors,
    check_batch,
    check_budget,
    check_cache,
    check_lists,
    check_queries,
    check_whole,
)
from lite_attention.pages.lists import PageLists
from lite_attention.pages.problem import Selection
from lite_attention.problem import Problem


def prepare_selection(
    q: Tensor,
    sketch: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    eps: float,
    min_context: int,
    newest: int,
    softmax_scale: float | None,
    k_descale: Tensor | None,
    lists: PageLists | None,
    whole: Tensor | None,
) -> Selection:
    """The arguments of `interface.select_pages`; makes lists where none are given."""
    check_inference(q=q, k_descale=k_descale)
    check_queries(q, sketch)
    check_batch(q, cu_seqlens_q, seqused_k, block_table, max_seqlen_q)
    check_budget(eps, min_context, newest)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[2])
    elif not (is_number(softmax_scale) and 0 < softmax_scale < math.inf):
        raise wrong("softmax_scale", softmax_scale, "a positive number, or None for 1 / sqrt(head_dim)")
    batch, heads_k, blocks = seqused_k.shape[0], sketch.shape[1], block_table.shape[1]
    check_whole(whole, batch, q.device)
    if lists is None:
        lists = PageLists.empty(batch, heads_k, q.shape[1], blocks, q.device)
    else:
        check_lists(lists, batch, heads_k, blocks, q)
    return Selection(
        q,
        sketch,
        lists,
        cu_seqlens_q,
        seqused_k,
        block_table,
        as_factors(k_descale, batch, heads_k, q),
        max_seqlen_q,
        float(softmax_scale),
        float(eps),
        min_context,
        newest,
        whole,
    )


def prepare_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    *,
    softmax_scale: float | None,
    sinks: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    scheduler_metadata: Tensor | None = None,
    out: Tensor | None,
    num_splits: int,
) -> Problem:
    """The arguments of `interface.attend_pages` but the lists; makes lse, and out where none is given."""
    check_inference(q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks, out=out)
    check_cache("k_cache", k_cache)
    check_operand("q", q, "(total_q, num_heads, head_dim)")
    check_batch(q, cu_seqlens_q, seqused_k, block_table, max_seqlen_q)
    return prepare(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q,
        seqused_k=seqused_k,
        block_table=block_table,
        scheduler_metadata=scheduler_metadata,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=block_table.shape[1] * k_cache.shape[1],
        softmax_scale=softmax_scale,
        causal=True,
        sinks=sinks,
        k_descale=k_descale,
        v_descale=v_descale,
        out=out,
        num_splits=num_splits,
        names=("k_cache", "v_cache", "seqused_k"),
    )

"""The torch custom ops of page lists. `lite_attention.ops` registers them; each writes in place and returns nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lite_attention.pages import cpu, reference
from lite_attention.pages.lists import PageLists
from lite_attention.pages.problem import Selection
from lite_attention.pages.values import check_lists, check_page_numbers, check_selection, check_start
from lite_attention.problem import Problem
from lite_attention.values import check_values

SKETCH_SCHEMA = "(Tensor k_cache, Tensor(a!) sketch, Tensor pages) -> ()"
SELECT_SCHEMA = (
    "(Tensor q, Tensor sketch, Tensor(a!) bits, Tensor(b!) indices, Tensor(c!) counts, Tensor(d!) left_out, "
    "Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, Tensor? k_descale, "
    "SymInt max_seqlen_q, float softmax_scale, float eps, int min_context, int newest, "
    "Tensor? whole) -> ()"
)
ATTEND_SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, Tensor(b!) lse, Tensor indices, Tensor counts, "
    "Tensor cu_seqlens_q, Tensor seqused_k, Tensor block_table, SymInt max_seqlen_q, float softmax_scale, "
    "Tensor? sinks, Tensor? k_descale, Tensor? v_descale, int num_splits=0) -> ()"
)
DECODE_SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) sketch, Tensor? filled, Tensor(b!) out, Tensor(c!) lse, "
    "Tensor(d!) bits, Tensor(e!) indices, Tensor(f!) counts, Tensor(g!) left_out, Tensor cu_seqlens_q, "
    "Tensor seqused_k, Tensor block_table, Tensor? k_descale, Tensor? v_descale, SymInt max_seqlen_q, "
    "float softmax_scale, float eps, int min_context, int newest, Tensor? whole, Tensor? sinks, "
    "Tensor? scheduler_metadata, int num_splits=0) -> ()"
)


def sketch(k_cache: Tensor, sketch: Tensor, pages: Tensor) -> None:
    """On the CPU and for the reference: sketches have one meaning, to the bit."""
    check_start(sketch)
    check_page_numbers("pages", pages, k_cache.shape[0])
    reference.write_sketch(k_cache, sketch, pages)


def select(
    q: Tensor, sketch: Tensor, bits: Tensor, indices: Tensor, counts: Tensor, left_out: Tensor, *rest: object
) -> None:
    """On the CPU and for the reference."""
    selection = Selection(q, sketch, PageLists(bits, indices, counts, left_out), *rest)
    check_selection(selection)
    reference.select(selection)


def attend_cpu(*args: object) -> None:
    _attend(cpu.attend, *args)


def attend_reference(*args: object) -> None:
    _attend(reference.attend, *args)


def decode_cpu(*args: object) -> None:
    _decode(cpu.attend, *args)


def decode_reference(*args: object) -> None:
    _decode(reference.attend, *args)


OPS = (
    ("lite_attention::page_sketch", SKETCH_SCHEMA, "CPU", sketch),
    ("lite_attention::page_sketch_reference", SKETCH_SCHEMA, "CompositeExplicitAutograd", sketch),
    ("lite_attention::page_select", SELECT_SCHEMA, "CPU", select),
    ("lite_attention::page_select_reference", SELECT_SCHEMA, "CompositeExplicitAutograd", select),
    ("lite_attention::page_attend", ATTEND_SCHEMA, "CPU", attend_cpu),
    ("lite_attention::page_attend_reference", ATTEND_SCHEMA, "CompositeExplicitAutograd", attend_reference),
    ("lite_attention::page_decode", DECODE_SCHEMA, "CPU", decode_cpu),
    ("lite_attention::page_decode_reference", DECODE_SCHEMA, "CompositeExplicitAutograd", decode_reference),
)
"""Name, schema, dispatch key and implementation of each."""


def launch_sketch(k_cache: Tensor, sketch: Tensor, pages: Tensor, backend: str) -> None:
    _op("page_sketch", backend)(k_cache, sketch, pages)


def launch_select(selection: Selection, backend: str) -> None:
    s = selection
    _op("page_select", backend)(
        s.q,
        s.sketch,
        s.lists.bits,
        s.lists.indices,
        s.lists.counts,
        s.lists.left_out,
        s.cu_seqlens_q,
        s.seqused_k,
        s.block_table,
        s.k_descale,
        s.max_seqlen_q,
        s.softmax_scale,
        s.eps,
        s.min_context,
        s.newest,
        s.whole,
    )


def launch_attend(problem: Problem, lists: PageLists, backend: str) -> None:
    """Computes `problem` over the listed pages into its `out` and `lse`."""
    _op("page_attend", backend)(
        problem.q,
        problem.k,
        problem.v,
        problem.out,
        problem.lse,
        lists.indices,
        lists.counts,
        problem.cu_seqlens_q,
        problem.seqused_k,
        problem.block_table,
        problem.max_seqlen_q,
        problem.softmax_scale,
        problem.sinks,
        problem.k_descale,
        problem.v_descale,
        problem.num_splits,
    )


def launch_decode(problem: Problem, selection: Selection, filled: Tensor | None, backend: str) -> None:
    """Writes sketches of the pages in `filled`, then the lists of `selection`, and computes `problem` over these."""
    s = selection
    _op("page_decode", backend)(
        problem.q,
        problem.k,
        problem.v,
        s.sketch,
        filled,
        problem.out,
        problem.lse,
        s.lists.bits,
        s.lists.indices,
        s.lists.counts,
        s.lists.left_out,
        problem.cu_seqlens_q,
        problem.seqused_k,
        problem.block_table,
        problem.k_descale,
        problem.v_descale,
        problem.max_seqlen_q,
        problem.softmax_scale,
        s.eps,
        s.min_context,
        s.newest,
        s.whole,
        problem.sinks,
        problem.scheduler_metadata,
        problem.num_splits,
    )


def _op(name: str, backend: str) -> object:
    return getattr(torch.ops.lite_attention, f"{name}_reference" if backend == "reference" else name)


def _attend(
    attend: Callable[[Problem, Tensor, Tensor], None],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    sinks: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    num_splits: int = 0,
) -> None:
    batch = cu_seqlens_q, seqused_k, block_table, max_seqlen_q
    problem = _problem(q, k_cache, v_cache, out, lse, *batch, softmax_scale, sinks, k_descale, v_descale, num_splits)
    check_values(problem)
    check_lists(problem, indices, counts)
    attend(problem, indices, counts)


def _decode(
    attend: Callable[[Problem, Tensor, Tensor], None],
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sketch: Tensor,
    filled: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bits: Tensor,
    indices: Tensor,
    counts: Tensor,
    left_out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float,
    eps: float,
    min_context: int,
    newest: int,
    whole: Tensor | None,
    sinks: Tensor | None,
    scheduler_metadata: Tensor | None,
    num_splits: int = 0,
) -> None:
    """All values are checked before anything is written. Nothing is planned here: the metadata isn't read."""
    lists, batch = PageLists(bits, indices, counts, left_out), (cu_seqlens_q, seqused_k, block_table)
    selection = Selection(
        q, sketch, lists, *batch, k_descale, max_seqlen_q, softmax_scale, eps, min_context, newest, whole
    )
    of_scores = max_seqlen_q, softmax_scale, sinks, k_descale, v_descale
    problem = _problem(q, k_cache, v_cache, out, lse, *batch, *of_scores, num_splits)
    if filled is not None:
        check_page_numbers("filled", filled, k_cache.shape[0])
    check_selection(selection)
    check_values(problem)
    if filled is not None:
        reference.write_sketch(k_cache, sketch, filled)
    reference.select(selection)
    attend(problem, indices, counts)


def _problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    sinks: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    num_splits: int,
) -> Problem:
    return Problem(
        q,
        k_cache,
        v_cache,
        out,
        lse,
        cu_seqlens_q,
        None,
        seqused_k,
        block_table,
        None,
        max_seqlen_q,
        block_table.shape[1] * k_cache.shape[1],
        softmax_scale,
        -1,
        0,
        sinks=sinks,
        num_splits=num_splits,
        k_descale=k_descale,
        v_descale=v_descale,
    )

"""The torch custom op of calls with skip lists. `lite_attention.ops` registers it, before it loads the CUDA one."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.problem import Problem
from lite_attention.skip import cpu, reference
from lite_attention.skip.problem import Lists
from lite_attention.values import check_values

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) skip_list, Tensor threshold, "
    "Tensor? must_do, Tensor? must_skip, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? block_table, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int window_left, int window_right, "
    "Tensor? sinks, int block_m, int block_n, bool update) -> ()"
)


def fwd_cpu(*args: object) -> None:
    problem, lists = _call(*args)
    cpu.run(problem, lists)


def fwd_reference(*args: object) -> None:
    problem, lists = _call(*args)
    reference.run(problem, lists)


def launch(problem: Problem, lists: Lists, backend: str) -> None:
    """Computes `problem` into its `out` and `lse` and updates the list, with the backend that `ops.choose` gave."""
    ops = torch.ops.lite_attention
    op = ops.skip_fwd_reference if backend == "reference" else ops.skip_fwd
    op(
        problem.q,
        problem.k,
        problem.v,
        problem.out,
        problem.lse,
        lists.bits,
        lists.threshold,
        lists.must_do,
        lists.must_skip,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        problem.seqused_k,
        problem.block_table,
        problem.max_seqlen_q,
        problem.max_seqlen_k,
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.sinks,
        lists.block_m,
        lists.block_n,
        lists.update,
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    skip_list: Tensor,
    threshold: Tensor,
    must_do: Tensor | None,
    must_skip: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    sinks: Tensor | None,
    block_m: int,
    block_n: int,
    update: bool,
) -> tuple[Problem, Lists]:
    """The op's arguments, once their values are checked."""
    problem = Problem(
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        None,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        window_left,
        window_right,
        sinks=sinks,
    )
    check_values(problem)
    if not (threshold <= 0).all():
        raise wrong("threshold", threshold.tolist(), "values of at most 0")
    return problem, Lists(skip_list, threshold, must_do, must_skip, block_m, block_n, update)

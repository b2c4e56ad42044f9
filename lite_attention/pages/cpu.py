"""The CPU path of attention over listed pages: it reads those pages, and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.pages.layout import PAGE
from lite_attention.problem import Problem, dequantised, select_pages
from lite_attention.reference import average


def attend(problem: Problem, indices: Tensor, counts: Tensor) -> None:
    """Computes `problem` over listed pages into its `out` and `lse`."""
    group = problem.heads // problem.heads_k
    for sequence in problem.sequences():
        b = sequence.index
        q, out, lse = problem.rows(sequence)
        positions = torch.arange(sequence.q_len)[:, None] + sequence.k_len - sequence.q_len
        for head, count in enumerate(counts[b].tolist()):
            pages = indices[b, head, :count]
            table = problem.block_table[b].index_select(0, pages)
            k, v = (
                dequantised(
                    select_pages(x[:, :, head : head + 1], table).flatten(0, 1),
                    None if descale is None else descale[b, head : head + 1],
                ).float()
                for x, descale in ((problem.k, problem.k_descale), (problem.v, problem.v_descale))
            )
            heads = slice(head * group, (head + 1) * group)
            scores = torch.einsum("ihd,jd->hij", q[:, heads].float(), k[:, 0]) * problem.softmax_scale
            keys = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
            sinks = None if problem.sinks is None else problem.sinks[heads]
            # No row's position is past the last key, so the end of the last page goes with what is not seen.
            result, result_lse = average(scores, keys <= positions, v.expand(-1, group, -1), sinks)
            out[:, heads] = result.to(out.dtype)
            lse[heads] = result_lse

"""The CPU path of attention over listed pages: it reads those pages, and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from lite_attention.cpu import with_sinks
from lite_attention.pages.layout import PAGE
from lite_attention.problem import Problem, dequantised, take
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
                    take(x[:, :, head : head + 1], table).flatten(0, 1),
                    None if descale is None else descale[b, head : head + 1],
                ).float()
                for x, descale in ((problem.k, problem.k_descale), (problem.v, problem.v_descale))
            )
            heads = slice(head * group, (head + 1) * group)
            # The heads of a group are rows of one head, so that its values are read once.
            scores = q[:, heads].float().flatten(0, 1) @ k[:, 0].T * problem.softmax_scale
            keys = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
            # No row's position is past the last key, so the end of the last page goes with what is not seen.
            seen = (keys <= positions).repeat_interleave(group, dim=0)
            result, result_lse = average(scores[None], seen, v, None)
            result = result.view(sequence.q_len, group, problem.head_dim)
            result_lse = result_lse.view(sequence.q_len, group)
            if problem.sinks is not None:
                result, result_lse = with_sinks(result, result_lse, problem.sinks[heads])
            out[:, heads] = result.to(out.dtype)
            lse[heads] = result_lse.T

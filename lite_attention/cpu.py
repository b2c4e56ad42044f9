"""The CPU path: PyTorch's fused attention for the CPU, one sequence at a time.

Each sequence's pages are gathered, and its query rows go in blocks, each over the slice of keys that some row of it
sees. So causal and windowed calls skip most of what they mask, and only blocks on an edge of the mask need one. ALiBi
rides on the mask; sinks follow from the lse. Padding the sequences of a decode batch into one call was measured slower
than one call each, for 1 to 32 sequences of 100 to 2000 tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention import reference
from lite_attention.problem import Problem, Sequence

BLOCK_ROWS = 128
FOLD_ROWS = 8  # up to here the heads of a GQA group are rows of one product: 4 times as fast for one bfloat16 row


def run(problem: Problem) -> None:
    """Computes `problem` into its `out` and `lse`."""
    if problem.softcap > 0:  # which the fused kernel lacks
        reference.run(problem)
        return
    sequences = list(problem.sequences())
    for sequence in sequences:
        _attend(problem, sequence)
    if not problem.out.isfinite().all():
        # Where one row of a block sees a NaN or infinity, the fused kernel gives 0 * NaN to rows that don't see it.
        for sequence in sequences:
            if not problem.rows(sequence)[1].isfinite().all():
                reference.run_sequence(problem, sequence)


def _attend(problem: Problem, sequence: Sequence) -> None:
    q, out, lse = problem.rows(sequence)
    k, v = problem.keys(sequence)
    seqlen_q, seqlen_k = sequence.q_len, sequence.k_len
    left, right = problem.window_left, problem.window_right
    shift = seqlen_k - seqlen_q  # row i stands at key position i + shift
    blind = seqlen_q if seqlen_k == 0 else 0
    if right >= 0:  # the first rows, where there are more of them than keys, see nothing; every other row sees a key
        blind = min(max(blind, -shift - right), seqlen_q)
    if blind > 0:
        out[:blind] = 0
        lse[:, :blind] = -math.inf
    for start in range(blind, seqlen_q, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, seqlen_q)
        first = max(start + shift - left, 0) if left >= 0 else 0
        last = min(stop + shift + right, seqlen_k) if right >= 0 else seqlen_k
        mask = _mask(start + shift, stop + shift, first, last, left, right, problem.slopes(sequence))
        result, result_lse = _fused(q[start:stop], k[first:last], v[first:last], mask, problem.softmax_scale)
        out[start:stop] = result
        lse[:, start:stop] = result_lse
    if problem.sinks is not None:
        with_sink = torch.logaddexp(lse, problem.sinks[:, None])
        out *= torch.exp(lse - with_sink).nan_to_num_(nan=0.0).T[:, :, None]
        lse.copy_(with_sink)


def _mask(start: int, stop: int, first: int, last: int, left: int, right: int, slopes: Tensor | None) -> Tensor | None:
    """What is added to the scores of the rows at positions [start, stop) and keys [first, last).

    Float32, (rows, keys), or with ALiBi (heads, rows, keys); None where it would be zero.
    """
    full_left = left < 0 or stop - 1 - left <= first
    full_right = right < 0 or start + right >= last - 1
    if full_left and full_right and slopes is None:
        return None
    distance = torch.arange(first, last) - torch.arange(start, stop)[:, None]
    if slopes is None:
        mask = torch.zeros(distance.shape)
    else:
        mask = -slopes[:, None, None] * distance.abs()
    if not full_left:
        mask.masked_fill_(distance < -left, -math.inf)
    if not full_right:
        mask.masked_fill_(distance > right, -math.inf)
    return mask


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + mask) v of one block by PyTorch's kernel, called by a name that gives the lse too."""
    rows, heads, head_dim = q.shape
    heads_k = k.shape[1]
    fold = rows <= FOLD_ROWS and heads_k < heads
    if fold:
        group = heads // heads_k
        q = q.view(rows, heads_k, group, head_dim).permute(1, 2, 0, 3).reshape(heads_k, group * rows, head_dim)
        if mask is not None:
            mask = mask.repeat(group, 1) if mask.dim() == 2 else mask.view(heads_k, group * rows, -1)
    else:
        q = q.transpose(0, 1)
    if mask is not None:
        mask = mask.expand(1, 1 if mask.dim() == 2 else q.shape[0], -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask, scale=scale
    )
    # Folded or not, (heads_k, group, rows) and (heads, rows) are the same order.
    return out[0].reshape(heads, rows, head_dim).transpose(0, 1), lse[0].reshape(heads, rows)

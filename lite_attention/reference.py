"""Attention as LiteAttention means it: the specification, in plain PyTorch, on any device.

Everything else in this package must give these answers up to rounding. All arithmetic is float32 whatever the inputs
are, and one sequence is computed at a time, from the keys that belong to it and no others. (On a GPU a switch of
PyTorch may turn float32 products into TF32; it is off unless the caller turned it on.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.problem import Problem, Sequence

SCORES_AT_ONCE = 1 << 26  # float32 scores held at a time, 256 MiB: long sequences go in blocks of query rows


def run(problem: Problem) -> None:
    """Computes `problem` into its `out` and `lse`. Reads lengths back to the host, so on a GPU it synchronises."""
    for sequence in problem.sequences():
        run_sequence(problem, sequence)


def run_sequence(problem: Problem, sequence: Sequence) -> None:
    """Computes one sequence of `problem`."""
    q, out, lse = problem.rows(sequence)
    k, v = problem.keys(sequence)
    result, result_lse = attend(
        q,
        k,
        v,
        softmax_scale=problem.softmax_scale,
        window_left=problem.window_left,
        window_right=problem.window_right,
        softcap=problem.softcap,
        alibi_slopes=problem.slopes(sequence),
        sinks=problem.sinks,
    )
    out.copy_(result)
    lse.copy_(result_lse)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence: q (seqlen_q, heads, head_dim) over k, v (seqlen_k, heads_k, head_dim).

    Query head h reads key head h // (heads // heads_k). Returns float32 out (seqlen_q, heads, head_dim) and lse (heads,
    seqlen_q), the natural logarithm of each row's softmax denominator.
    """
    seqlen_q, heads, head_dim = q.shape
    seqlen_k, heads_k, _ = k.shape
    k = k.float().repeat_interleave(heads // heads_k, dim=1)
    v = v.float().repeat_interleave(heads // heads_k, dim=1)
    out = torch.empty(seqlen_q, heads, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(heads, seqlen_q, dtype=torch.float32, device=q.device)

    block = max(1, SCORES_AT_ONCE // max(1, heads * seqlen_k))
    for start in range(0, seqlen_q, block):
        rows = slice(start, min(start + block, seqlen_q))
        seen = visible(rows, seqlen_q, seqlen_k, window_left, window_right, device=q.device)
        scores = torch.einsum("ihd,jhd->hij", q[rows].float(), k) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.float()[:, None, None] * distance(rows, seqlen_q, seqlen_k, q.device).abs()
        out[rows], lse[:, rows] = average(scores, seen, v, sinks)
    return out, lse


def distance(rows: slice, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """How many keys after a row's own position each key lies, (rows, seqlen_k).

    Query row i stands at key position i + seqlen_k - seqlen_q: the last row faces the last key (bottom right).
    """
    position = torch.arange(rows.start, rows.stop, device=device)[:, None] + seqlen_k - seqlen_q
    return torch.arange(seqlen_k, device=device) - position


def visible(
    rows: slice, seqlen_q: int, seqlen_k: int, window_left: int, window_right: int, device: torch.device
) -> Tensor:
    """Which keys these query rows of a sequence see: bool, (rows, seqlen_k)."""
    after = distance(rows, seqlen_q, seqlen_k, device)
    seen = torch.ones_like(after, dtype=torch.bool)
    if window_left >= 0:
        seen &= after >= -window_left
    if window_right >= 0:
        seen &= after <= window_right
    return seen


def average(scores: Tensor, seen: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean of v (keys, heads, head_dim) by the softmax of scores (heads, rows, keys) over the keys that are seen.

    `seen` is (rows, keys), or (heads, rows, keys) where heads differ. Returns out (rows, heads, head_dim) and lse
    (heads, rows).
    """
    scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:  # a sink is a key with a logit of its own and a value of zero
        lse = torch.logaddexp(lse, sinks.float()[:, None])
    # A row without keys has a denominator of exp(-inf) = 0; its weights are 0, not 0 / 0.
    weights = torch.exp(scores - lse[..., None]).masked_fill(~seen, 0.0)
    return _weighted_sum(weights, v, seen), lse


def _weighted_sum(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """sum_j weights[h, i, j] * v[j, h, :] over the keys that row i sees: those it doesn't add nothing, even if NaN."""
    finite = v.isfinite().all(dim=2).all(dim=1)
    out = torch.einsum("hij,jhd->ihd", weights, v.masked_fill(~finite[:, None, None], 0.0))
    for j in torch.nonzero(~finite).flatten().tolist():
        term = weights[:, :, j].T[:, :, None] * v[j]
        out += torch.where(seen[..., j].expand(weights.shape[:2]).T[:, :, None], term, 0.0)
    return out

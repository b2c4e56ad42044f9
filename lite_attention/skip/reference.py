"""Attention with a skip list as LiteAttention means it: the specification, in plain PyTorch, on any device.

For each query head and q tile of a sequence:

1. The KV tiles in question are those that any of its rows sees: causal masks and windows, aligned to the bottom right,
   and the sequence's own key length. Of them it visits those of the list and of `must_do`, but for those that are of
   `must_skip` and not of `must_do`.
2. It walks the visited tiles from the last to the first. For each row, a tile's max is over the keys that the row sees
   there, of the raw score q.k; the row's running max is over all tiles visited before. The tile stays where in any row
   (tile max - running max) * softmax_scale * log2(e) > threshold. A row that sees nothing in the tile has no say. A row
   that has seen nothing before, and now sees a key, lets it stay. The first visited tile always stays.
   (So says IEEE arithmetic, where seeing nothing is a max of -inf. A score of -inf or NaN counts as nothing seen.)
3. Where the call updates the list, the bit of each visited tile becomes whether it stays, also the bit of a `must_do`
   tile that was not in the list. All other bits keep their value.
4. A row's output and lse are of the softmax over the keys that it sees in visited tiles, those included that leave the
   list. Where there are none they are zeros and -inf, or the sink's. Where a sequence visits all tiles that its rows
   see, they are those of the dense reference bit for bit.

All arithmetic is float32. The bits of other backends agree with these unless a vote is a tie up to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.problem import Problem, Sequence
from lite_attention.reference import average, visible
from lite_attention.reference import run_sequence as run_dense
from lite_attention.skip.problem import Lists, above


def run(problem: Problem, lists: Lists) -> None:
    """Computes `problem` into its `out` and `lse` and updates the list. Synchronises, on a GPU."""
    for sequence in problem.sequences():
        run_sequence(problem, lists, sequence)


def run_sequence(problem: Problem, lists: Lists, sequence: Sequence) -> None:
    """Computes one sequence of `problem`."""
    whole = lists.visits_all(problem, sequence)
    if whole:  # by the dense reference: a product of other rows at a time may round otherwise
        run_dense(problem, sequence)
        if not lists.update:
            return
    q, out, lse = problem.rows(sequence)
    k, v = (x.float().repeat_interleave(problem.heads // problem.heads_k, dim=1) for x in problem.keys(sequence))
    for m, rows in lists.q_tiles(sequence):
        seen = visible(rows, sequence.q_len, sequence.k_len, problem.window_left, problem.window_right, device=q.device)
        visited = lists.visited(problem, sequence, m, rows)
        scores = torch.einsum("ihd,jhd->hij", q[rows].float(), k)
        if lists.update:
            lists.strike(sequence, m, visited, _stays(scores, seen, visited, lists, problem.softmax_scale))
        if whole:
            continue
        columns = visited.repeat_interleave(lists.block_n, dim=1)[:, : sequence.k_len]
        out[rows], lse[:, rows] = average(scores * problem.softmax_scale, seen & columns[:, None, :], v, problem.sinks)


def _stays(scores: Tensor, seen: Tensor, visited: Tensor, lists: Lists, softmax_scale: float) -> Tensor:
    """Which of the visited tiles stay: bool, (heads, tiles)."""
    heads, rows, _ = scores.shape
    scores = scores.masked_fill(~seen | scores.isnan(), -math.inf)
    running = torch.full((heads, rows), -math.inf, device=scores.device)
    first = torch.ones(heads, dtype=torch.bool, device=scores.device)  # nothing visited yet
    threshold = lists.threshold.expand(heads)[:, None]
    stays = torch.zeros_like(visited)
    for n in reversed(range(visited.shape[1])):
        tile_max = scores[:, :, n * lists.block_n : (n + 1) * lists.block_n].amax(-1)
        votes = above(tile_max - running, softmax_scale, threshold).any(dim=1)
        visits = visited[:, n]
        stays[:, n] = visits & (votes | first)
        running = torch.where(visits[:, None], running.maximum(tile_max), running)
        first &= ~visits
    return stays

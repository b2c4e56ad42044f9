"""The CPU path of calls with skip lists: products with the keys of visited tiles only.

A sequence that visits all tiles gets what the dense CPU path computes; here it only votes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.cpu import run_sequences
from lite_attention.problem import Problem, Sequence
from lite_attention.reference import average, visible
from lite_attention.skip.problem import Lists, above


def run(problem: Problem, lists: Lists) -> None:
    """Computes `problem` into its `out` and `lse` and updates the list."""
    sequences = list(problem.sequences())
    whole = [sequence for sequence in sequences if lists.visits_all(problem, sequence)]
    run_sequences(problem, whole)
    for sequence in sequences:
        computed = sequence in whole
        if lists.update or not computed:
            run_sequence(problem, lists, sequence, computed)


def run_sequence(problem: Problem, lists: Lists, sequence: Sequence, computed: bool) -> None:
    """Computes one sequence of `problem`, or only its votes where out and lse are `computed`."""
    q, out, lse = problem.rows(sequence)
    k, v = (x.transpose(0, 1).contiguous() for x in problem.keys(sequence))  # a head's keys side by side
    group = problem.heads // problem.heads_k
    for m, rows in lists.q_tiles(sequence):
        seen = visible(rows, sequence.q_len, sequence.k_len, problem.window_left, problem.window_right, device=q.device)
        visited = lists.visited(problem, sequence, m, rows)
        stays = torch.zeros_like(visited)
        for head in range(problem.heads):
            tiles = visited[head].nonzero().flatten()
            columns = (tiles[:, None] * lists.block_n + torch.arange(lists.block_n)).flatten()
            real = columns < sequence.k_len
            columns = columns.where(real, 0)  # any key: it is masked
            scores = q[rows, head].float() @ k[head // group, columns].float().T
            sees = seen[:, columns] & real
            if lists.update:
                noted = scores.masked_fill(~sees | scores.isnan(), -math.inf)
                tile_max = noted.unflatten(1, (len(tiles), lists.block_n)).amax(-1)
                stays[head, tiles] = _stays(
                    tile_max, problem.softmax_scale, lists.threshold.expand(problem.heads)[head]
                )
            if computed:
                continue
            result, result_lse = average(
                scores[None] * problem.softmax_scale,
                sees,
                v[head // group, columns].float()[:, None],
                None if problem.sinks is None else problem.sinks[head : head + 1],
            )
            out[rows, head], lse[head, rows] = result[:, 0], result_lse[0]
        if lists.update:
            lists.strike(sequence, m, visited, stays)


def _stays(tile_max: Tensor, softmax_scale: float, threshold: Tensor) -> Tensor:
    """Which of a head's visited tiles stay, (tiles,), by the max of each row in each of them, (rows, tiles)."""
    walked = tile_max.flip(1)  # from the last tile to the first
    start = torch.full((tile_max.shape[0], 1), -math.inf)
    before = torch.cat([start, walked], dim=1).cummax(dim=1).values[:, :-1]
    stays = above(walked - before, softmax_scale, threshold).any(dim=0).flip(0)
    stays[-1:] = True  # nothing comes before it
    return stays

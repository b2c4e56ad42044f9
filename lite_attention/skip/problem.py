"""One attention call with a skip list, as every backend is given it: a `Problem` and its `Lists`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.problem import Problem, Sequence
from lite_attention.skip.bits import pack, unpack
from lite_attention.skip.tiles import tile_count


@dataclass
class Lists:
    """What a call has beside its `Problem`.

    - bits: int32 (batch, heads, q_tiles, words), as `SkipList.bits`; updated in place.
    - threshold: float32, () or (heads,), in log2 units.
    - must_do, must_skip: int32 (batch, words), KV tiles that are visited whatever the list says, and that are not; a
      tile of both is of must_do.
    - block_m, block_n: query tokens and keys of a tile.
    - update: whether tiles leave the list.
    """

    bits: Tensor
    threshold: Tensor
    must_do: Tensor | None
    must_skip: Tensor | None
    block_m: int
    block_n: int
    update: bool

    def q_tiles(self, sequence: Sequence) -> Iterator[tuple[int, slice]]:
        """The q tiles that a sequence has, each with its rows."""
        for m in range(tile_count(sequence.q_len, self.block_m)):
            yield m, slice(m * self.block_m, min((m + 1) * self.block_m, sequence.q_len))

    def visited(self, problem: Problem, sequence: Sequence, m: int, rows: slice) -> Tensor:
        """Which KV tiles the q tile m visits: bool, (heads, KV tiles of the sequence)."""
        tiles = tile_count(sequence.k_len, self.block_n)
        bits = self.bits[sequence.index, :, m]
        if self.must_skip is not None:
            bits = bits & ~self.must_skip[sequence.index]
        if self.must_do is not None:
            bits = bits | self.must_do[sequence.index]
        begin, end = self._range(problem, sequence, rows)
        n = torch.arange(tiles, device=bits.device)
        return unpack(bits, tiles) & (n >= begin) & (n < end)

    def visits_all(self, problem: Problem, sequence: Sequence) -> bool:
        """Whether every q tile of the sequence visits all KV tiles that it sees."""
        for m, rows in self.q_tiles(sequence):
            begin, end = self._range(problem, sequence, rows)
            if not self.visited(problem, sequence, m, rows)[:, begin:end].all():
                return False
        return True

    def strike(self, sequence: Sequence, m: int, visited: Tensor, stays: Tensor) -> None:
        """Brings the list of q tile m up to date: a visited tile's bit becomes whether it stays."""
        bits = self.bits[sequence.index, :, m]
        was, is_now = (self._words(tiles) for tiles in (visited, visited & stays))
        bits.copy_((bits & ~was) | is_now)

    def _range(self, problem: Problem, sequence: Sequence, rows: slice) -> tuple[int, int]:
        """The KV tiles [begin, end) that these rows see: the first row sees the first of them, the last the last."""
        shift = sequence.k_len - sequence.q_len  # row i stands at key position i + shift
        first, last = 0, sequence.k_len
        if problem.window_left >= 0:
            first = max(0, rows.start + shift - problem.window_left)
        if problem.window_right >= 0:
            last = min(last, max(0, rows.stop + shift + problem.window_right))
        return first // self.block_n, tile_count(last, self.block_n)

    def _words(self, tiles: Tensor) -> Tensor:
        """Packed as `bits`, whose rows may be of a longer sequence."""
        words = torch.zeros(tiles.shape[0], self.bits.shape[-1], dtype=torch.int32, device=tiles.device)
        packed = pack(tiles)
        words[:, : packed.shape[-1]] = packed
        return words


def above(rise: Tensor, softmax_scale: float, threshold: Tensor) -> Tensor:
    """Where `rise`, of a tile's max over the running max in units of q.k, exceeds the threshold in log2 units.

    NaN, the distance of no score from no score, doesn't. Rounds to float32 after each step, as the kernels do.
    """
    scale_log2 = torch.tensor(softmax_scale, dtype=torch.float32) * torch.tensor(math.log2(math.e), dtype=torch.float32)
    return rise * scale_log2.item() > threshold

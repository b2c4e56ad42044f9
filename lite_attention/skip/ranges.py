"""Ranges of tokens that calls visit always, or never, as masks of KV tiles.

Ranges become one flag a token, tokens become tiles: so ranges that overlap or adjoin count as one, and where a tile
begins needs no case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lite_attention.checks import check_ints, wrong
from lite_attention.skip.bits import pack
from lite_attention.skip.tiles import tile_count
from lite_attention.values import readable

Pair: TypeAlias = tuple[int, int]
Ranges: TypeAlias = Sequence[Pair] | Sequence[Sequence[Pair]] | Tensor

FORM = "(begin, end) pairs for all batch entries, a sequence of pairs for each, or an int32 tensor (batch, n, 2)"


def must_do_mask(ranges: Ranges, bits: Tensor, seqlen_k: int, block_n: int) -> Tensor:
    """int32 (batch, words): the tiles that have a token in any of the ranges. `SkipList.must_do_mask` says more."""
    covered = _covered(as_tensor("must_do", ranges, bits, seqlen_k), seqlen_k)
    return pack(_by_tile(covered, block_n, beyond=False).any(-1))


def must_skip_mask(ranges: Ranges, bits: Tensor, seqlen_k: int, block_n: int) -> Tensor:
    """int32 (batch, words): the tiles whose tokens all lie in the ranges. `SkipList.must_skip_mask` says more."""
    covered = _covered(as_tensor("must_skip", ranges, bits, seqlen_k), seqlen_k)
    return pack(_by_tile(covered, block_n, beyond=True).all(-1))


def as_tensor(name: str, ranges: Ranges, bits: Tensor, seqlen_k: int) -> Tensor:
    """int32 (batch, n, 2), for the batch of `bits` and on its device."""
    batch = bits.shape[0]
    if isinstance(ranges, Tensor):
        check_ints(name, ranges, (batch, "n", 2), bits)
        if readable(ranges):
            for entry in ranges.tolist():
                _check_pairs(name, entry, seqlen_k)
        return ranges
    entries = _by_entry(name, ranges, batch)
    for entry in entries:
        _check_pairs(name, entry, seqlen_k)
    longest = max([0, *[len(entry) for entry in entries]])  # a form that torch.compile traces
    padded = [[*entry, *[(0, 0)] * (longest - len(entry))] for entry in entries]
    return torch.tensor(padded, dtype=torch.int32, device=bits.device).view(batch, longest, 2)


def _by_entry(name: str, ranges: Ranges, batch: int) -> list[list[Pair]]:
    if not _is_list(ranges) or not all(_is_list(x) for x in ranges):
        raise wrong(name, ranges, FORM)
    nested = [all(_is_list(x) for x in entry) for entry in ranges]
    if not any(nested) or not ranges:
        return [list(ranges)] * batch
    if not all(nested):
        raise wrong(name, ranges, FORM)
    if len(ranges) != batch:
        raise wrong(name, f"ranges for {len(ranges)} entries", f"ranges for each of the {batch} of the batch")
    return [list(entry) for entry in ranges]


def _is_list(x: object) -> bool:
    return isinstance(x, (list, tuple))


def _check_pairs(name: str, entry: Sequence[Pair], seqlen_k: int) -> None:
    for pair in entry:
        if len(pair) != 2 or not all(isinstance(x, (int, torch.SymInt)) for x in pair):
            raise wrong(name, pair, FORM)
        if not 0 <= pair[0] <= pair[1] <= seqlen_k:
            raise wrong(name, tuple(pair), f"0 <= begin <= end <= {seqlen_k}, the keys of the list")


def _covered(ranges: Tensor, seqlen_k: int) -> Tensor:
    """Which tokens lie in any of the ranges: bool, (batch, seqlen_k)."""
    begin, end = ranges.long().clamp(0, seqlen_k).unbind(-1)
    depth = torch.zeros(ranges.shape[0], seqlen_k + 1, dtype=torch.int32, device=ranges.device)
    one = torch.ones(begin.shape, dtype=torch.int32, device=ranges.device)
    depth.scatter_add_(1, begin, one)
    depth.scatter_add_(1, end.maximum(begin), -one)
    return depth.cumsum(1)[:, :seqlen_k] > 0


def _by_tile(covered: Tensor, block_n: int, beyond: bool) -> Tensor:
    """(batch, tiles, block_n), where tokens after the last key are `beyond`."""
    batch, seqlen_k = covered.shape
    tiles = tile_count(seqlen_k, block_n)
    whole = torch.full((batch, tiles * block_n), beyond, device=covered.device)
    whole[:, :seqlen_k] = covered
    return whole.view(batch, tiles, block_n)

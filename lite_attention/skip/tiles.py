"""The tiles of skip lists that are made by head dim. The CPU path and the reference take tiles of any shape."""

from __future__ import annotations

from lite_attention.checks import wrong

TILE_SHAPES = {64: (192, 128), 96: (128, 128), 128: (128, 176), 192: (128, 112), 256: (128, 64)}
"""(block_m, block_n) by the largest head dim that has them, those of kSkip in csrc/sm90/traits.cuh."""


def tile_shape(head_dim: int) -> tuple[int, int]:
    """(block_m, block_n), query tokens and keys of a tile, of lists for `head_dim`.

    Raises:
        ValueError: `head_dim` is less than 1 or more than 256.
    """
    for largest, shape in TILE_SHAPES.items():
        if 0 < head_dim <= largest:
            return shape
    raise wrong("head_dim", head_dim, f"1 to {max(TILE_SHAPES)}")


def tile_count(tokens: int, block: int) -> int:
    """Tiles of `block` tokens that hold `tokens`; the last may be partial."""
    return -(-tokens // block)

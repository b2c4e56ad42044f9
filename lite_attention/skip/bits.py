"""Rows of booleans as int32 words: element n is bit n % 32 of word n // 32."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def words(count: int) -> int:
    """Words that hold `count` bits."""
    return -(-count // WORD)


def pack(flags: Tensor) -> Tensor:
    """Bool (..., count) as int32 (..., words(count)); the bits after the last element are 0."""
    count = flags.shape[-1]
    padded = torch.zeros(*flags.shape[:-1], words(count) * WORD, dtype=torch.int32, device=flags.device)
    padded[..., :count] = flags
    shifted = padded.unflatten(-1, (words(count), WORD)) << torch.arange(WORD, dtype=torch.int32, device=flags.device)
    return shifted.sum(-1, dtype=torch.int32)  # no two have a bit in common, so that the sum is their union


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of int32 (..., words) as bool (..., count)."""
    shifts = torch.arange(WORD, dtype=torch.int32, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :count] != 0


def count(packed: Tensor) -> Tensor:
    """How many bits of each word are set: int32, of the same shape. In parallel: of pairs, of fours, of bytes."""
    pairs = packed - ((packed >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    in_bytes = (fours + (fours >> 4)) & 0x0F0F0F0F
    return (in_bytes * 0x01010101) >> 24  # the product's highest byte is their sum, at most 32

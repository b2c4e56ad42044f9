"""What the sketch of a page is, byte by byte.

A sketch is of the 16 keys that one KV head has in one full page. The one that is farthest from their mean is kept apart
from the other 15, of which the sketch has the mean and one standard deviation for all channels. There are two formats,
by the bits of a channel. 12 are 8 of the mean and 4 of the key apart, 8 are 4 of each. Why one key is apart: most of
what a mean and a deviation of all 16 miss is the mass of a single key (docs/sketch-study.md). Summaries of pages for
decoding are Quest's (arXiv 2406.10774).

The sketches of a cache are uint8, (num_blocks, heads_k, sketch_bytes(head_dim, bits)), and all have the same format:
their size says which, as no head_dim has the same size in both. One page and head has, with D = head_dim and sections
that each start at a multiple of 16 bytes:

| from byte | bytes | what |
|---|---|---|
| 0 | 16 | float32, little-endian: offset and step of the mean, step of the difference, deviation |
| 16, of 12 bits | D | the code of each channel's mean |
| 16 + D, rounded up to 16 | 4 for each 8 channels | differences: two bytes of channels 0, 2, 4, 6, two of 1, 3, 5, 7 |
| 16, of 8 bits | D | a channel in each byte: the code of its mean low, of its difference high |

Of two codes in a byte the first is in its low half. What no channel has is 0, in bytes and halves of them.

- The farthest key is the one with the largest sum over channels of (key - mean of the 16)^2, of several alike the
  first.
- The mean is that of the other 15 keys. A channel of it is offset + code * step; offset is the least over the channels,
  and offset + 255 steps, where a code has 8 bits, or 15 the largest: it lies within half a step of what was encoded.
- The difference is the farthest key less the mean as it is decoded: (code - 8) * step, with codes 1 to 15, and 8 where
  all channels are alike. 7 steps are the largest absolute value over the channels, so the farthest key too lies within
  half a step.
- The deviation is the root of the mean, over the 15 keys and all channels, of (key - exact mean of the 15)^2.

Sums are float32. Where the farthest key is a thousand times as far away as the others are from each other, kernels may
round the deviation by some percent, and beyond that to anything up to a thousandth of the distance: next to nothing
beside what that key does.

With head_dim 128 it is 208 bytes, or 144 of 8 bits, beside the 8192 of the page's bf16 keys and values, 2.5% or 1.8%;
with 64 it is 112 or 80 beside 4096.

Four NaNs in place of offset, steps and deviation, and codes of 0, say that the page has no moments: a key is not
finite, or so large that sums of squares in float32 are not. Whoever reads the sketch must take such a page to matter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lite_attention.checks import wrong

PAGE = 16  # tokens
OTHERS = PAGE - 1  # keys of a page that aren't kept apart
ALIGNMENT = 16  # bytes, of a vector load
HEADER = 16  # bytes
BITS = (12, 8)  # of a channel
MEAN_LEVELS = {12: 255, 8: 15}
DIFFERENCE_LEVELS = 7  # of either sign
NO_DIFFERENCE = 8  # its code


class Moments(NamedTuple):
    """What sketches say of pages; NaN where a page has no moments.

    Attributes:
        mean: float32 (..., head_dim), of 15 keys.
        difference: float32 (..., head_dim), the farthest key less `mean`.
        deviation: float32 (...,), of the 15 keys around their mean, alike in all channels.
    """

    mean: Tensor
    difference: Tensor
    deviation: Tensor


def sketch_bytes(head_dim: int, bits: int = 12) -> int:
    """Bytes of the sketch of one page and KV head; a multiple of 16.

    Raises:
        ValueError: `bits` of neither 12 nor 8.
    """
    if bits not in BITS:
        raise wrong("bits", bits, "12, 8 of a channel's mean and 4 of the key apart, or 8, 4 of each")
    return HEADER + _aligned(head_dim) + (_aligned(-(-head_dim // 2)) if bits == 12 else 0)


def bits_of(head_dim: int, size: int) -> int | None:
    """The bits of a channel in sketches of so many bytes; None where no format has that size."""
    return next((bits for bits in BITS if sketch_bytes(head_dim, bits) == size), None)


def encode(k: Tensor, bits: int = 12) -> Tensor:
    """The sketches of pages of keys, (..., 16, head_dim) of any dtype: uint8, (..., sketch_bytes)."""
    k = k.float()
    head_dim = k.shape[-1]
    apart = (k - k.mean(-2, keepdim=True)).square().sum(-1, keepdim=True)
    is_farthest = torch.zeros_like(apart, dtype=torch.bool).scatter(-2, apart.argmax(-2, keepdim=True), True)
    farthest = k.where(is_farthest, 0.0).sum(-2)
    mean = k.where(~is_farthest, 0.0).sum(-2) / OTHERS
    around = (k - mean.unsqueeze(-2)).where(~is_farthest, 0.0)
    deviation = (around.square().sum((-2, -1)) / (OTHERS * head_dim)).sqrt()

    mean_codes, offset, step = _quantised(mean, MEAN_LEVELS[bits])
    difference = farthest - (offset + mean_codes * step)
    difference_step = difference.abs().amax(-1, keepdim=True) / DIFFERENCE_LEVELS
    codes = (difference / difference_step).round().clamp(-DIFFERENCE_LEVELS, DIFFERENCE_LEVELS).nan_to_num(0.0)
    codes = (codes + NO_DIFFERENCE).to(torch.uint8)
    header = torch.cat([offset, step, difference_step, deviation.unsqueeze(-1)], dim=-1)
    known = header.isfinite().all(-1, keepdim=True) & apart.isfinite().all(-2)

    sketch = torch.zeros(*mean.shape[:-1], sketch_bytes(head_dim, bits), dtype=torch.uint8, device=k.device)
    sketch[..., :HEADER] = header.where(known, math.nan).view(torch.uint8)
    means = sketch[..., HEADER : HEADER + head_dim]
    means.copy_(mean_codes * known)
    codes *= known
    if bits == 8:
        means |= codes << 4
        return sketch
    pairs = _in_eights(torch.nn.functional.pad(codes, (0, -head_dim % 8)))
    start = _differences_at(head_dim)
    sketch[..., start : start + pairs.shape[-2]] = pairs[..., 0] | pairs[..., 1] << 4
    return sketch


def decode(sketch: Tensor, head_dim: int) -> Moments:
    """What sketches of a cache, (..., sketch_bytes), say."""
    offset, step, difference_step, deviation = sketch[..., :HEADER].contiguous().view(torch.float32).split(1, -1)
    codes = sketch[..., HEADER : HEADER + head_dim]
    if bits_of(head_dim, sketch.shape[-1]) == 8:
        means, differences = codes & 15, codes >> 4
    else:
        start = _differences_at(head_dim)
        pairs = sketch[..., start : start + -(-head_dim // 8) * 4]
        means, differences = codes, _from_eights(torch.stack([pairs & 15, pairs >> 4], dim=-1))[..., :head_dim]
    difference = (differences.to(torch.float32) - NO_DIFFERENCE) * difference_step
    return Moments(offset + means * step, difference, deviation.squeeze(-1))


def _quantised(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (..., head_dim), offset and step (..., 1). Where all channels are alike the codes are 0."""
    offset = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - offset) / levels
    codes = ((x - offset) / step).round().clamp(0, levels).nan_to_num(0.0)
    return codes.to(torch.uint8), offset, step


def _in_eights(x: Tensor) -> Tensor:
    """(..., 8 n) to (..., 4 n, 2): of each 8 channels the even ones, then the odd ones, in pairs."""
    return x.unflatten(-1, (-1, 2, 2, 2)).permute(*range(x.dim() - 1), -4, -1, -3, -2).flatten(-4, -2)


def _from_eights(pairs: Tensor) -> Tensor:
    """The inverse."""
    split = pairs.unflatten(-2, (-1, 2, 2))
    return split.permute(*range(pairs.dim() - 2), -4, -2, -1, -3).flatten(-4)


def _differences_at(head_dim: int) -> int:
    """Of 12 bits."""
    return HEADER + _aligned(head_dim)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

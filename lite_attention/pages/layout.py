"""What the sketch of a page is, byte by byte.

A sketch is of the 16 keys that one KV head has in one full page: their mean, and their standard deviation around it.
There are two formats, by the bits of a channel. 12 are 8 of the mean and 4 of the deviation, 8 are 4 of each. The idea
is of this project's study of decode lists; summaries of pages for decoding are Quest's (arXiv 2406.10774).

The sketches of a cache are uint8, (num_blocks, heads_k, sketch_bytes(head_dim, bits)), and all have the same format:
their size says which, as no head_dim has the same size in both. One page and head has, with D = head_dim and sections
that each start at a multiple of 16 bytes:

| from byte | bytes | what |
|---|---|---|
| 0 | 16 | float32, little-endian: offset and step of the means, offset and step of the deviations |
| 16, of 12 bits | D | the code of each channel's mean |
| 16 + D, rounded up to 16 | D / 2, rounded up | deviations: channel 2j in the low half of byte j, 2j + 1 in the high |
| 16, of 8 bits | D | a channel in each byte: the code of its mean in the low half, of its deviation in the high |

Bytes that fill up a section are 0. A value is offset + code * step; offset is the least over the channels, and offset +
255 steps, where a code has 8 bits, or 15 the largest. So it lies within half a step of what was encoded, and deviations
are never negative.

With head_dim 128 it is 208 bytes, or 144 of 8 bits, beside the 8192 of the page's bf16 keys and values, 2.5% or 1.8%;
with 64 it is 112 or 80 beside 4096.

Four NaNs in place of offsets and steps, and codes of 0, say that the page has no moments: a key is not finite, or too
large for sums in float32. Whoever reads the sketch must take such a page to matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.checks import wrong

PAGE = 16  # tokens
ALIGNMENT = 16  # bytes, of a vector load
HEADER = 16  # bytes
BITS = (12, 8)  # of a channel
MEAN_LEVELS = {12: 255, 8: 15}
DEVIATION_LEVELS = 15


def sketch_bytes(head_dim: int, bits: int = 12) -> int:
    """Bytes of the sketch of one page and KV head; a multiple of 16.

    Raises:
        ValueError: `bits` of neither 12 nor 8.
    """
    if bits not in BITS:
        raise wrong("bits", bits, "12, 8 of a channel's mean and 4 of its deviation, or 8, 4 of each")
    return HEADER + _aligned(head_dim) + (_aligned(-(-head_dim // 2)) if bits == 12 else 0)


def bits_of(head_dim: int, size: int) -> int | None:
    """The bits of a channel in sketches of so many bytes; None where no format has that size."""
    return next((bits for bits in BITS if sketch_bytes(head_dim, bits) == size), None)


def encode(k: Tensor, bits: int = 12) -> Tensor:
    """The sketches of pages of keys, (..., 16, head_dim) of any dtype: uint8, (..., sketch_bytes)."""
    k = k.float()
    head_dim = k.shape[-1]
    mean = k.mean(-2)
    deviation = (k - mean.unsqueeze(-2)).square().mean(-2).sqrt()
    mean_codes, mean_scales = _quantised(mean, MEAN_LEVELS[bits])
    deviation_codes, deviation_scales = _quantised(deviation, DEVIATION_LEVELS)
    scales = torch.cat([mean_scales, deviation_scales], dim=-1)
    known = scales.isfinite().all(-1, keepdim=True)

    sketch = torch.zeros(*mean.shape[:-1], sketch_bytes(head_dim, bits), dtype=torch.uint8, device=k.device)
    sketch[..., :HEADER] = scales.where(known, math.nan).view(torch.uint8)
    codes = sketch[..., HEADER : HEADER + head_dim]
    codes.copy_(mean_codes * known)
    if bits == 8:
        codes |= deviation_codes * known << 4
        return sketch
    low, high = deviation_codes[..., 0::2] * known, deviation_codes[..., 1::2] * known
    start = _deviations_at(head_dim)
    sketch[..., start : start + low.shape[-1]] = low
    sketch[..., start : start + high.shape[-1]] |= high << 4
    return sketch


def decode(sketch: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (..., head_dim); NaN where a page has no moments."""
    scales = sketch[..., :HEADER].contiguous().view(torch.float32)
    codes = sketch[..., HEADER : HEADER + head_dim]
    if bits_of(head_dim, sketch.shape[-1]) == 8:
        mean_codes, deviation_codes = codes & 15, codes >> 4
    else:
        start = _deviations_at(head_dim)
        pairs = sketch[..., start : start + -(-head_dim // 2)]
        mean_codes, deviation_codes = codes, torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)[..., :head_dim]
    mean = scales[..., 0:1] + mean_codes * scales[..., 1:2]
    deviation = scales[..., 2:3] + deviation_codes * scales[..., 3:4]
    return mean, deviation


def _quantised(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 (..., head_dim), and offset and step (..., 2). Where all channels are alike the codes are 0."""
    offset = x.amin(-1, keepdim=True)
    step = (x.amax(-1, keepdim=True) - offset) / levels
    codes = ((x - offset) / step).round().clamp(0, levels).nan_to_num(0.0)
    return codes.to(torch.uint8), torch.cat([offset, step], dim=-1)


def _deviations_at(head_dim: int) -> int:
    """Of 12 bits."""
    return HEADER + _aligned(head_dim)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

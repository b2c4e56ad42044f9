"""What the sketch of a page is, byte by byte.

A sketch is of the 16 keys that one KV head has in one full page: their mean in 8 bits a channel, and their standard
deviation around it in 4. The idea is of this project's study of decode lists; summaries of pages for decoding are
Quest's (arXiv 2406.10774).

The sketches of a cache are uint8, (num_blocks, heads_k, sketch_bytes(head_dim)). Those of one page and head, with
D = head_dim and sections that each start at a multiple of 16 bytes:

| from byte | bytes | what |
|---|---|---|
| 0 | 16 | float32, little-endian: offset and step of the means, offset and step of the deviations |
| 16 | D | the code of each channel's mean |
| 16 + D, rounded up to 16 | D / 2, rounded up | deviations: channel 2j in the low half of byte j, 2j + 1 in the high |

Bytes that fill up a section are 0. A value is offset + code * step; offset is the least over the channels, and offset +
255 or 15 steps the largest. So it lies within half a step of what was encoded, and deviations are never negative.

With head_dim 128 it is 208 bytes beside the 8192 of the page's bf16 keys and values, 2.5%; with 64 it is 112 beside
4096.

Four NaNs in place of offsets and steps, and codes of 0, say that the page has no moments: a key is not finite, or too
large for sums in float32. Whoever reads the sketch must take such a page to matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PAGE = 16  # tokens
ALIGNMENT = 16  # bytes, of a vector load
HEADER = 16  # bytes
MEAN_LEVELS = 255
DEVIATION_LEVELS = 15


def sketch_bytes(head_dim: int) -> int:
    """Bytes of the sketch of one page and KV head; a multiple of 16."""
    return _deviations_at(head_dim) + _aligned(-(-head_dim // 2))


def encode(k: Tensor) -> Tensor:
    """The sketches of pages of keys, (..., 16, head_dim) of any dtype: uint8, (..., sketch_bytes)."""
    k = k.float()
    head_dim = k.shape[-1]
    mean = k.mean(-2)
    deviation = (k - mean.unsqueeze(-2)).square().mean(-2).sqrt()
    mean_codes, mean_scales = _quantised(mean, MEAN_LEVELS)
    deviation_codes, deviation_scales = _quantised(deviation, DEVIATION_LEVELS)
    scales = torch.cat([mean_scales, deviation_scales], dim=-1)
    known = scales.isfinite().all(-1, keepdim=True)

    sketch = torch.zeros(*mean.shape[:-1], sketch_bytes(head_dim), dtype=torch.uint8, device=k.device)
    sketch[..., :HEADER] = scales.where(known, math.nan).view(torch.uint8)
    sketch[..., HEADER : HEADER + head_dim] = mean_codes * known
    low, high = deviation_codes[..., 0::2] * known, deviation_codes[..., 1::2] * known
    start = _deviations_at(head_dim)
    sketch[..., start : start + low.shape[-1]] = low
    sketch[..., start : start + high.shape[-1]] |= high << 4
    return sketch


def decode(sketch: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, float32 (..., head_dim); NaN where a page has no moments."""
    scales = sketch[..., :HEADER].contiguous().view(torch.float32)
    start = _deviations_at(head_dim)
    mean_codes = sketch[..., HEADER : HEADER + head_dim]
    pairs = sketch[..., start : start + -(-head_dim // 2)]
    deviation_codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)[..., :head_dim]
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
    return HEADER + _aligned(head_dim)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

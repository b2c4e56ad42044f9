"""Attention over all keys from attention over parts of them."""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def merge_attention(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys that have none in common, from that over each, as Ring Attention does it.

    Args:
        out, other_out: (batch, seqlen_q, num_heads, head_dim), any floating dtypes.
        lse, other_lse: (batch, num_heads, seqlen_q), float32: natural logarithms of the softmax denominators; -inf for
            a row that saw no key, whose out is zeros.

    Returns:
        out, float32, and lse over both. Arithmetic is float32; a row that saw no key in either gives zeros and -inf.
    """
    both = torch.logaddexp(lse, other_lse)
    anchor = both.clamp(min=LOWEST)  # -inf - -inf would be NaN

    def weighted(x: Tensor, of: Tensor) -> Tensor:
        return x.float() * torch.exp(of - anchor).transpose(1, 2)[..., None]

    return weighted(out, lse) + weighted(other_out, other_lse), both

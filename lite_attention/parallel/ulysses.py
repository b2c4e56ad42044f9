"""Ulysses: each rank exchanges its tokens of all heads for all tokens of its heads, and back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(batch, tokens of this rank, heads, dim) to (batch, tokens, heads of this rank, dim)."""
    size = dist.get_world_size(group)
    by_rank = x.unflatten(2, (size, -1)).movedim(2, 0)
    return _exchange(by_rank, group).movedim(0, 1).flatten(1, 2)


def to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(batch, tokens, heads of this rank, dim) to (batch, tokens of this rank, heads, dim)."""
    size = dist.get_world_size(group)
    by_rank = x.unflatten(1, (size, -1)).movedim(1, 0)
    return _exchange(by_rank, group).movedim(0, 2).flatten(2, 3)


def _exchange(by_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r goes to rank r, and row r of the result comes from it."""
    sent = by_rank.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received

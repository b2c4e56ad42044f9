"""The ring: each rank has a part of the keys and values, and sees all parts, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.skip.ranges import Ranges, as_tensor


def around(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The KV parts as they come by, each with the rank that it is of: this rank's first.

    While the caller computes with one part, the next is on its way.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    part = torch.stack((k, v))
    for turn in range(size):
        works, coming = [], None
        if turn + 1 < size:
            coming = torch.empty_like(part)
            works = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, part, after, group), dist.P2POp(dist.irecv, coming, before, group)]
            )
        yield (rank - turn) % size, part[0], part[1]
        for work in works:
            work.wait()
        part = coming


def of_part(name: str, ranges: Ranges | None, part: int, tokens: int, parts: int, q: Tensor) -> Ranges | None:
    """Ranges of tokens of the whole sequence, as those of one part of it, of `tokens`.

    Those in Python numbers stay so: a `LiteAttention` recognises them in the next call.
    """
    if ranges is None:
        return None
    if isinstance(ranges, Tensor) and ranges.dim() == 2:
        raise wrong(name, "a mask of tiles", "token ranges, as the tiles of each rank start at its first token")
    like = q if isinstance(ranges, Tensor) else torch.empty(q.shape[0], device="cpu")
    own = (as_tensor(name, ranges, like, parts * tokens) - part * tokens).clamp(0, tokens)
    return own if isinstance(ranges, Tensor) else own.tolist()

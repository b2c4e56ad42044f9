"""Whether all ranks have tensors of one shape, without which an exchange hangs or mixes up memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lite_attention.checks import wrong


def check_agree(names: str, tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> None:
    """Raises ValueError, on all ranks, where the shapes differ between them. Waits for all ranks and the GPU."""
    own = torch.tensor([size for x in tensors for size in x.shape], device=tensors[0].device)
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, own, group=group)
    shapes = [tuple(sizes.tolist()) for sizes in of_ranks]
    if len(set(shapes)) > 1:
        raise wrong(names, f"the sizes {shapes} on ranks 0 to {len(shapes) - 1}", "the same sizes on all ranks")

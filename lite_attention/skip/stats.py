"""How much `LiteAttention` modules skip: numbers, by layer, stream, call and head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lite_attention.skip.state import StreamState


@dataclass(frozen=True, eq=False)
class StreamStats:
    """What one stream of a layer skips. Sparsity is the part left out of the tiles that the mask lets queries see.

    Attributes:
        now: float32, (heads,), on the CPU: of a call that would visit what the list has.
        steps: the numbers of the recorded calls, oldest first. They count from the last reset, or with `num_steps` from
            the first call of their sequence.
        sparsity: float32, (recorded calls, heads), on the CPU: of these calls, with their must_do_list and
            must_skip_list. Of calls that were dense it is 0.
    """

    now: Tensor
    steps: tuple[int, ...]
    sparsity: Tensor

    @property
    def mean(self) -> float:
        """Mean sparsity of the recorded calls; NaN without any."""
        return self.sparsity.mean().item()


def stats_of(state: StreamState, num_steps: int | None) -> StreamStats:
    """The stats of a state. Waits for the GPU."""
    now = state.sparsity(state.skip_list).cpu()
    if state.history is None:
        return StreamStats(now, (), torch.empty(0, now.shape[0]))
    calls, kept = int(state.calls), state.history.shape[0]
    recorded = range(max(0, calls - kept), calls)
    steps = tuple(call % num_steps if num_steps else call for call in recorded)
    return StreamStats(now, steps, state.history.cpu()[[call % kept for call in recorded]])

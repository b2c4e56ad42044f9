"""What a `LiteAttention` module keeps of one stream of calls: the list, its threshold, and how many calls it served.

All that a call changes is in tensors on its device, and changes in place: a captured CUDA graph that is replayed goes
on as the calls that it was captured from would.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lite_attention.checks import wrong
from lite_attention.problem import Problem
from lite_attention.skip.bits import count
from lite_attention.skip.checks import as_mask
from lite_attention.skip.ranges import Ranges
from lite_attention.skip.skip_list import SkipList


@dataclass(frozen=True)
class Shape:
    """The calls that a state serves, but for their device."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, problem: Problem) -> Shape:
        return cls(tuple(problem.q.shape), tuple(problem.k.shape), problem.q.dtype)

    def fits(self, problem: Problem) -> bool:
        return self.q == tuple(problem.q.shape) and self.k == tuple(problem.k.shape) and self.dtype == problem.q.dtype


@dataclass(eq=False)
class StreamState:
    """The state of one stream.

    - skip_list: as the last call left it.
    - threshold: float32, (num_steps or 1, heads), in log2 units: of each step, or of all.
    - calls: int64, (), those since the list was last reset.
    - in_view: int32, (q_tiles, words), the KV tiles that the mask lets a q tile see.
    - history: float32, (kept calls, heads): call n has row n % kept calls, the part of the tiles in view that it left
      out. Rows of calls that were not yet made mean nothing. None where nothing is recorded.
    """

    shape: Shape
    skip_list: SkipList
    threshold: Tensor
    calls: Tensor
    in_view: Tensor
    history: Tensor | None
    _masks: dict[str, tuple[Ranges, Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(
        cls, problem: Problem, tile: tuple[int, int] | None, threshold: Tensor, num_steps: int | None, kept_calls: int
    ) -> StreamState:
        """The state before the first call, `problem`.

        `threshold` is (), (heads,) or (num_steps, heads), on any device.
        """
        q, k = problem.q, problem.k
        if threshold.dim() and threshold.shape[-1] != problem.heads:
            works = (*threshold.shape[:-1], problem.heads)
            raise wrong("threshold", f"shape {tuple(threshold.shape)}", f"() or {works}, as q has heads")
        if not torch.compiler.is_compiling() and q.is_cuda and torch.cuda.is_current_stream_capturing():
            # Memory of the graph, which every replay would set back to its start.
            raise RuntimeError(
                "a CUDA graph captures a call of LiteAttention whose stream has no state yet for its shapes; make the "
                "call once before the capture"
            )
        # Not tensors of inference mode: those could change only in it.
        with torch.inference_mode(False):
            skip_list = SkipList.fresh(
                q.shape[0],
                q.shape[2],
                q.shape[1],
                k.shape[1],
                head_dim=q.shape[3] if tile is None else None,
                tile=tile,
                device=q.device,
            )
            return cls(
                Shape.of(problem),
                skip_list,
                torch.empty(num_steps or 1, problem.heads, dtype=torch.float32, device=q.device).copy_(threshold),
                torch.zeros((), dtype=torch.int64, device=q.device),
                skip_list.in_view(problem.window_left, problem.window_right),
                torch.zeros(kept_calls, problem.heads, dtype=torch.float32, device=q.device) if kept_calls else None,
            )

    def serves(self, problem: Problem) -> bool:
        """Whether it is a state of such calls."""
        return self.skip_list.bits.device == problem.q.device and self.shape.fits(problem)

    def reset(self) -> None:
        """Starts a new sequence of calls."""
        self.skip_list.reset()
        self.calls.zero_()

    def begin(self, num_steps: int | None, refresh_every: int | None) -> None:
        """Visits all tiles again where the next call is the first of `num_steps`, or `refresh_every` calls are over.

        It may be done twice: only `end` counts the call.
        """
        if num_steps is None and refresh_every is None:
            return
        step = self.calls if num_steps is None else self.calls % num_steps
        due = step == 0 if refresh_every is None else step % refresh_every == 0
        self.skip_list.bits.bitwise_or_(-due.int())  # all bits of -1 are set

    def threshold_now(self) -> Tensor:
        """That of the next call: float32, (heads,)."""
        if self.threshold.shape[0] == 1:
            return self.threshold[0]
        step = self.calls % self.threshold.shape[0]
        return self.threshold.index_select(0, step.view(1))[0]  # an index of Python's would wait for the GPU

    def end(self) -> None:
        """Counts the call."""
        self.calls.add_(1)

    def record(self, visits: SkipList, must_do: Tensor | None, must_skip: Tensor | None) -> None:
        """Writes into the history what the next call leaves out of the list `visits`."""
        if self.history is None:
            return
        row = (self.calls % self.history.shape[0]).view(1)
        self.history.index_copy_(0, row, self.sparsity(visits, must_do, must_skip)[None])

    def sparsity(self, visits: SkipList, must_do: Tensor | None = None, must_skip: Tensor | None = None) -> Tensor:
        """The part of the tiles in view that a call with these arguments leaves out: float32, (heads,)."""
        bits = visits.bits
        if must_skip is not None:
            bits = bits & ~must_skip[:, None, None]
        if must_do is not None:
            bits = bits | must_do[:, None, None]
        visited = count(bits & self.in_view).sum((0, 2, 3))
        in_all = count(self.in_view).sum() * bits.shape[0]
        return 1 - visited / in_all.clamp(min=1).float() if bits.numel() else torch.zeros_like(self.threshold[0])

    def mask(self, name: str, ranges: Ranges | None) -> Tensor | None:
        """`ranges`, of "must_do" or "must_skip", as a mask, (batch, words).

        Those of the last call are kept: from Python numbers to a GPU's memory is a copy that waits for the GPU. In a
        compiled call they are constants, and what it makes may be memory of a CUDA graph.
        """
        if ranges is None:
            return None
        if isinstance(ranges, Tensor) or torch.compiler.is_compiling():
            return as_mask(name, ranges, self.skip_list)
        if name not in self._masks or self._masks[name][0] != ranges:
            self._masks[name] = copy.deepcopy(ranges), as_mask(name, ranges, self.skip_list)
        return self._masks[name][1]

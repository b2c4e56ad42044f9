"""`SeqParallelLiteAttention`: a `LiteAttention` for sequences that are split over the ranks of a process group."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lite_attention import ops
from lite_attention.checks import check_inference, prepare, wrong
from lite_attention.module import DEFAULT_STREAM, LiteAttention
from lite_attention.parallel.agree import check_agree
from lite_attention.parallel.merge import merge_attention
from lite_attention.parallel.ring import around, of_part
from lite_attention.parallel.ulysses import to_heads, to_tokens
from lite_attention.skip.checks import check_features
from lite_attention.skip.ranges import Ranges
from lite_attention.skip.stats import StreamStats

METHODS = ("ring", "ulysses")


class SeqParallelLiteAttention(nn.Module):
    """Attention with skip lists where each rank has an equal, consecutive part of the tokens, in the order of ranks.

    - `method="ring"`: keys and values go round the ranks. A rank has a list for each part of the keys, for its own
      queries; results over the parts are merged by their lse, in float32. Votes are within a part: what is negligible
      only beside the keys of another rank stays, so that it skips less than one list of all keys would. Any number of
      heads will do.
    - `method="ulysses"`: the ranks exchange tokens for heads, and each has one list, for all tokens of its heads, which
      is what a single process has for these. The number of ranks divides both numbers of heads.

    Each list is that of a `LiteAttention` in `parts`: in the ring `parts[r]` is for the keys of rank r, and in Ulysses
    there is only `parts[0]`. So `collect_stats`, and `state_dict` with `save_state=True`, have what this rank has.
    Streams, `num_steps` and the rest are as in `LiteAttention`.

    Backends of torch.distributed: any that has the tensors' device, as NCCL and Gloo. All ranks make the same calls.
    With the first call of each shape they compare their shapes, which waits for all; where only some of the ranks go on
    to another shape, the exchange hangs until its timeout.

    Ideas: LiteAttention, arXiv 2511.11062; Ring Attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509.

    Args:
        method: "ring" or "ulysses".
        process_group: of the ranks that have the parts; None is all.
        threshold: as in `LiteAttention`; of all heads, also in Ulysses.
        causal: in the ring, ranks have as many queries as keys, and compute nothing with the parts after their own:
            the last rank has the most work.
        window_size: a window goes with Ulysses only.
        enable_skipping, options: as in `LiteAttention`.

    Raises:
        ValueError: an argument out of range.
        NotImplementedError: a window in the ring.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        method: str,
        process_group: dist.ProcessGroup | None = None,
        enable_skipping: bool = True,
        threshold: float | Sequence[float] | Tensor = -10.0,
        *,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        name: str | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise wrong("method", repr(method), " or ".join(map(repr, METHODS)))
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("process_group: torch.distributed has none yet; call init_process_group before")
        if method == "ring" and tuple(window_size) != (-1, -1):
            raise NotImplementedError(
                f"window_size: got {window_size}; method='ring' has only (-1, -1), and method='ulysses' any"
            )
        self.method = method
        self.causal = causal
        self.window_size = window_size
        self.process_group = dist.group.WORLD if process_group is None else process_group
        self.rank, self.ranks = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        # Of the ring's parts only a rank's own lies on the diagonal.
        on_diagonal = [causal and part == self.rank for part in range(self.ranks)] if method == "ring" else [causal]
        self.parts = nn.ModuleList(
            LiteAttention(
                enable_skipping,
                causal=diagonal,
                window_size=window_size,
                name=None if name is None else f"{name}.parts.{part}",
                **options,
            )
            for part, diagonal in enumerate(on_diagonal)
        )
        self.set_threshold(threshold)
        self._agreed: set[tuple[torch.Size, ...]] = set()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        return_softmax_lse: bool = False,
        must_do_list: Ranges | None = None,
        must_skip_list: Ranges | None = None,
        *,
        stream: str = DEFAULT_STREAM,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of this rank's queries over the keys of all ranks.

        Args:
            q: (batch, tokens of this rank, num_heads, head_dim); in Ulysses as many tokens on all ranks.
            k, v: (batch, tokens of this rank, num_heads_k, head_dim); as many tokens on all ranks.
            must_do_list, must_skip_list: token ranges of the whole sequence, the same on all ranks. In the ring they
                round to tiles that start at the first token of each rank, and are no masks.
            scale, return_softmax_lse, stream: as in `LiteAttention`.

        Returns:
            out (batch, tokens of this rank, num_heads, head_dim) in the dtype of q; with `return_softmax_lse` also lse,
            float32, (batch, num_heads, tokens of this rank).

        Raises:
            ValueError, NotImplementedError, RuntimeError: as `LiteAttention` does, before anything is exchanged; shapes
                that differ between ranks.
        """
        check_inference(q=q, k=k, v=v)
        check_features(q=q, k=k, v=v)
        ops.choose(prepare(q, k, v, softmax_scale=scale), self.parts[0].backend)
        self._check(q, k, v)
        attend = self._ring if self.method == "ring" else self._ulysses
        out, lse = attend(q, k, v, scale, must_do_list, must_skip_list, stream)
        return (out, lse) if return_softmax_lse else out

    def reset_skip_state(self, stream: str | None = None) -> None:
        """As `LiteAttention.reset_skip_state`; of this rank's lists, so all ranks call it."""
        for part in self.parts:
            part.reset_skip_state(stream)

    def drop_skip_state(self, stream: str | None = None) -> None:
        """As `LiteAttention.drop_skip_state`."""
        for part in self.parts:
            part.drop_skip_state(stream)

    def enable_skip_optimization(self, enable: bool = True) -> None:
        """As `LiteAttention.enable_skip_optimization`."""
        for part in self.parts:
            part.enable_skip_optimization(enable)

    def set_threshold(self, threshold: float | Sequence[float] | Tensor) -> None:
        """As `LiteAttention.set_threshold`; one for each head is of all heads, also in Ulysses."""
        if self.method == "ulysses" and not isinstance(threshold, (int, float)):
            given = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold)
            if given.dim():
                if given.shape[-1] % self.ranks:
                    raise wrong(
                        "threshold",
                        f"{given.shape[-1]} values",
                        f"one for each head, of which {self.ranks} ranks have as many",
                    )
                threshold = given.chunk(self.ranks, dim=-1)[self.rank]
        for part in self.parts:
            part.set_threshold(threshold)

    def stats(self) -> tuple[dict[str, StreamStats], ...]:
        """The stats of each part, by stream, as this rank has them. Waits for the GPU."""
        return tuple(part.stats() for part in self.parts)

    def __deepcopy__(self, memo: dict) -> SeqParallelLiteAttention:
        """A copy with lists of its own, on the same process group, of which there are no copies."""
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        return f"method={self.method!r}, rank={self.rank} of {self.ranks}"

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.method == "ulysses":
            for name, x in (("q", q), ("k", k)):
                if x.shape[2] % self.ranks:
                    works = f"a number that the {self.ranks} ranks divide; method='ring' has any"
                    raise wrong(name, f"{x.shape[2]} heads", works)
        elif self.causal and q.shape[1] != k.shape[1]:
            raise wrong("q", f"{q.shape[1]} tokens", f"as many as k, {k.shape[1]}, where the ring is causal")
        # In the ring queries stay where they are, so that their number may be of a rank.
        names, exchanged = ("q and k", (q, k)) if self.method == "ulysses" else ("k", (k,))
        shapes = tuple(x.shape for x in exchanged)
        if shapes not in self._agreed:
            check_agree(names, exchanged, self.process_group)
            self._agreed.add(shapes)

    def _ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        must_do: Ranges | None,
        must_skip: Ranges | None,
        stream: str,
    ) -> tuple[Tensor, Tensor]:
        ranges = [
            [
                of_part(name, x, part, k.shape[1], self.ranks, q)
                for name, x in (("must_do", must_do), ("must_skip", must_skip))
            ]
            for part in range(self.ranks)
        ]
        out = lse = None
        for part, k_part, v_part in around(k, v, self.process_group):
            if self.causal and part > self.rank:
                continue
            new = self.parts[part](q, k_part, v_part, scale, True, *ranges[part], stream=stream)
            out, lse = new if out is None else merge_attention(out, lse, *new)
        return out.to(q.dtype), lse

    def _ulysses(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        must_do: Ranges | None,
        must_skip: Ranges | None,
        stream: str,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (to_heads(x, self.process_group) for x in (q, k, v))
        out, lse = self.parts[0](q, k, v, scale, True, must_do, must_skip, stream=stream)
        lse = to_tokens(lse.transpose(1, 2)[..., None], self.process_group)[..., 0].transpose(1, 2)
        return to_tokens(out, self.process_group), lse

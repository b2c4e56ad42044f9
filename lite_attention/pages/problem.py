"""One call that selects pages, normalised: what every backend is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lite_attention.pages.lists import PageLists
from lite_attention.problem import Sequence


@dataclass
class Selection:
    """A checked call. Tensors are the caller's own.

    - q: (total_q, heads, head_dim); sketch: uint8 (num_blocks, heads_k, bytes), as `layout` says.
    - lists: written.
    - cu_seqlens_q (batch + 1,), seqused_k (batch,), block_table (batch, max_blocks): int32.
    - k_descale: float32 (batch, heads_k), or None for 1.
    - eps, min_context, newest, whole: as `interface.select_pages` has them.
    """

    q: Tensor
    sketch: Tensor
    lists: PageLists
    cu_seqlens_q: Tensor
    seqused_k: Tensor
    block_table: Tensor
    k_descale: Tensor | None
    max_seqlen_q: int
    softmax_scale: float
    eps: float
    min_context: int
    newest: int
    whole: Tensor | None

    @property
    def heads_k(self) -> int:
        return self.sketch.shape[1]

    def sequences(self) -> Iterator[Sequence]:
        """The sequences of the batch. Reads lengths back to the host."""
        starts, lengths = self.cu_seqlens_q.tolist(), self.seqused_k.tolist()
        for b, k_len in enumerate(lengths):
            yield Sequence(b, starts[b], starts[b + 1] - starts[b], 0, k_len)

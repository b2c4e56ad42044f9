"""What the layers of a KV-cache group have read and left out, counted on the device.

Each layer's lists come with their counts; the last layer adds those of all to the totals, in the CUDA graph where there
is one, and sends the totals to memory of the host. Nothing waits: the host's copy is a step or less behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lite_attention.pages import PAGE

if TYPE_CHECKING:
    from vllm_plugin.decoding import Decoding

GROUPS = ("first", "middle", "last")  # thirds of the model's layers


class Tally:
    """Totals of `layers` layers, by thirds of the model, for this process's heads.

    Attributes:
        layers: how many layers it counts.
        serving: whether it has started.
        sketch_bytes: of the sketches of all of their pages.
    """

    def __init__(
        self,
        thirds: list[int],
        rows: int,
        heads: int,
        heads_k: int,
        min_context: int,
        sketch_bytes: int,
        device: torch.device,
    ) -> None:
        """`thirds`: for each layer which of `GROUPS` it is in; `rows`: the most rows of a step."""
        self.layers, self.heads_k, self.min_context, self.sketch_bytes = len(thirds), heads_k, min_context, sketch_bytes
        self.serving = False
        self._warm = False
        self._layers_of = torch.tensor([thirds.count(group) for group in range(len(GROUPS))])
        groups = len(GROUPS)
        # By group pages read and mass left out; then pages that a head of a layer could see, rows, and those listed.
        self._totals = torch.zeros(2 * groups + 3, dtype=torch.float64, device=device)
        # The same of one step, of each layer; and the total that each goes to.
        self._step = torch.zeros(2 * self.layers + 3, dtype=torch.float64, device=device)
        places = [*thirds, *(groups + third for third in thirds), *range(2 * groups, 2 * groups + 3)]
        self._places = torch.tensor(places, device=device)
        self._least = torch.tensor([[1], [max(min_context, 1)]], dtype=torch.int32, device=device)
        self._counts = torch.zeros(self.layers, rows, heads_k, dtype=torch.int32, device=device)
        self._left_out = torch.zeros(self.layers, rows, heads, dtype=torch.float32, device=device)
        self._heads = heads
        self._copy = torch.zeros_like(self._totals, device="cpu", pin_memory=device.type == "cuda")

    def of_layer(self, slot: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the layer's counts (rows, heads_k) and left-out mass (rows, heads) go."""
        return self._counts[slot, :rows], self._left_out[slot, :rows]

    def add(self, rows: Decoding) -> None:
        """Adds a step of all layers. Rows of padding have no keys, and count for nothing.

        Few operations, as each is a node of the CUDA graph, whose launch takes longer than its work.
        """
        batch, layers = rows.seq_lens.shape[0], self.layers
        read, left_out, pages, counted = self._step.split([layers, layers, 1, 2])
        torch.sum(self._counts[:, :batch], (1, 2), dtype=torch.float64, out=read)
        torch.sum(self._left_out[:, :batch], (1, 2), dtype=torch.float64, out=left_out)
        torch.sum((rows.seq_lens + (PAGE - 1)) // PAGE, 0, keepdim=True, dtype=torch.float64, out=pages)
        there = rows.seq_lens >= self._least
        torch.gt(there[1], rows.whole, out=there[1])  # and not whole
        torch.sum(there, 1, dtype=torch.float64, out=counted)
        self._totals.index_add_(0, self._places, self._step)
        self._copy.copy_(self._totals, non_blocking=True)

    def start(self) -> None:
        """Counts from here on: what vLLM ran before was to warm up."""
        self._totals.zero_()
        self._copy.zero_()  # until a step has sent the totals again
        self.serving = True

    def warmed_up(self) -> None:
        """Takes back a start that the warm-up made. Only the first call does: another engine's is none of ours."""
        if not self._warm:
            self._warm, self.serving = True, False

    def snapshot(self) -> dict[str, list[float] | float]:
        """The totals as the host has them: lists have an entry for each of `GROUPS`."""
        groups = len(GROUPS)
        values = self._copy.clone() if self.serving else torch.zeros_like(self._copy)
        pages, rows, listed = values[2 * groups :].tolist()
        return {
            "pages_read": values[:groups].tolist(),
            "pages_visible": (self._layers_of * self.heads_k * pages).tolist(),
            "left_out_mass": values[groups : 2 * groups].tolist(),
            "decisions": (self._layers_of * self._heads * rows).tolist(),
            "rows_listed": listed,
            "rows_dense": rows - listed,
            "sketch_bytes": float(self.sketch_bytes),
        }

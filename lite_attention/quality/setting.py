"""What is compared: dense attention, and lists with different budgets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """How decode steps attend.

    Attributes:
        eps: the share of softmax mass that a list may leave out; 0 lists everything; None is dense attention, without
            lists.
        newest: tokens that are always read.
        dense_layers: layers by index that stay dense; from the end where negative, as in vLLM's settings.
    """

    eps: float | None
    newest: int = 64
    dense_layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return "dense" if self.eps is None else f"eps {self.eps:g}"

    def lists(self, layer: int, layers: int) -> bool:
        """Whether this layer, of so many, decodes from lists."""
        return self.eps is not None and layer not in self.dense_layers and layer - layers not in self.dense_layers


DENSE = Setting(None)

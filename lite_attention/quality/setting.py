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
        layer_eps: index, from the end where negative, and eps of each layer that doesn't take `eps`.
    """

    eps: float | None
    newest: int = 64
    dense_layers: tuple[int, ...] = ()
    layer_eps: tuple[tuple[int, float], ...] = ()

    def __str__(self) -> str:
        if self.eps is None:
            return "dense"
        return f"eps {self.eps:g}" + (", by layer" if self.layer_eps else "")

    def lists(self, layer: int, layers: int) -> bool:
        """Whether this layer, of so many, decodes from lists."""
        return self.eps is not None and layer not in self.dense_layers and layer - layers not in self.dense_layers

    def eps_of(self, layer: int, layers: int) -> float:
        """The eps of this layer, of so many, where it decodes from lists."""
        own = dict(self.layer_eps)
        return own.get(layer, own.get(layer - layers, self.eps))


DENSE = Setting(None)

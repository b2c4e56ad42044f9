"""What a calibration finds, and how the `LiteAttention` modules of a model get it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lite_attention.checks import wrong
from lite_attention.collect import lite_modules
from lite_attention.module import LiteAttention


@dataclass(frozen=True)
class HeadGroup:
    """Query heads [begin, end) of a layer, which have their thresholds in common.

    Attributes:
        thresholds: one for each step range, in log2 units.
        error: largest relative L2 error of a step range against dense attention.
        sparsity: mean part of the tiles in view that was left out, over all steps.
    """

    begin: int
    end: int
    thresholds: tuple[float, ...]
    error: float
    sparsity: float


@dataclass(frozen=True)
class Layer:
    """A `LiteAttention` module by its name, as `lite_modules` has it; `tile` is (block_m, block_n)."""

    name: str
    head_dim: int
    tile: tuple[int, int]
    groups: tuple[HeadGroup, ...]

    @property
    def num_heads(self) -> int:
        return self.groups[-1].end


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of a model, with what they were made for and what they reached there.

    Attributes:
        target: relative error that each head group was allowed.
        output_error: relative L2 error of the model's output against its dense run; None where it wasn't measured.
        num_steps: calls of a stream for one prompt.
        step_ranges: (begin, end) of each step range, end excluded.
        layers: in the order of the model.
    """

    target: float
    output_error: float | None
    num_steps: int
    step_ranges: tuple[tuple[int, int], ...]
    layers: tuple[Layer, ...]

    @property
    def error(self) -> float:
        """Largest error of a head group."""
        return max(group.error for layer in self.layers for group in layer.groups)

    @property
    def sparsity(self) -> float:
        """Mean over all layers and heads."""
        groups = [(group.end - group.begin, group.sparsity) for layer in self.layers for group in layer.groups]
        return sum(heads * sparsity for heads, sparsity in groups) / sum(heads for heads, _ in groups)

    def apply(self, model: nn.Module) -> None:
        """Gives each `LiteAttention` of `model` its thresholds.

        Raises:
            ValueError: layers, heads, tiles or steps are not those that the thresholds were made for. Heads and head
                dim of a module that had no call yet are only known, and checked, in its first one.
        """
        modules = lite_modules(model)
        names = [layer.name for layer in self.layers]
        if set(names) != set(modules):
            missing, extra = sorted(set(names) - set(modules)), sorted(set(modules) - set(names))
            given = "; ".join(
                f"{what} {', '.join(some)}"
                for what, some in (("without the layers", missing), ("with the further layers", extra))
                if some
            )
            raise wrong("model", f"LiteAttention modules {given}", f"those of the thresholds, {', '.join(names)}")
        for layer in self.layers:
            self._check(layer, modules[layer.name])
        for layer in self.layers:
            modules[layer.name].set_threshold(self._by_step(layer))

    def _check(self, layer: Layer, module: LiteAttention) -> None:
        constant = len(self.step_ranges) == 1 and module.num_steps is None
        if module.num_steps != self.num_steps and not constant:
            raise wrong(
                "model", f"{layer.name} with num_steps={module.num_steps}", f"that of the thresholds, {self.num_steps}"
            )
        tiles = {module.tile} - {None}
        for stream in module.streams:
            visits = module.skip_list(stream)
            tiles.add((visits.block_m, visits.block_n))
            if visits.num_heads != layer.num_heads:
                raise wrong("model", f"{layer.name} with {visits.num_heads} heads", f"{layer.num_heads}")
        if tiles - {layer.tile}:
            raise wrong("model", f"{layer.name} with tiles of {min(tiles - {layer.tile})}", f"{layer.tile}")

    def _by_step(self, layer: Layer) -> Tensor:
        """(num_heads,), or (num_steps, num_heads) where steps differ."""
        ranges = torch.empty(len(self.step_ranges), layer.num_heads)
        for group in layer.groups:
            ranges[:, group.begin : group.end] = torch.tensor(group.thresholds)[:, None]
        if len(self.step_ranges) == 1:
            return ranges[0]
        return ranges.repeat_interleave(torch.tensor([end - begin for begin, end in self.step_ranges]), dim=0)

"""The `LiteAttention` modules of a model, and what they skip."""

from __future__ import annotations

from torch import nn

from lite_attention.checks import wrong
from lite_attention.module import LiteAttention
from lite_attention.skip.stats import StreamStats


def lite_modules(model: nn.Module) -> dict[str, LiteAttention]:
    """Every `LiteAttention` in a model, in the order of `model.modules()`.

    A module goes by the `name` that it was given, or else by its place in the model.

    Raises:
        ValueError: two modules have one name.
    """
    found: dict[str, LiteAttention] = {}
    for place, module in model.named_modules():
        if not isinstance(module, LiteAttention):
            continue
        name = place if module.name is None else module.name
        if name in found:
            raise wrong("model", f"two LiteAttention modules with name={name!r}", "a name of its own for each, or None")
        found[name] = module
    return found


def collect_stats(model: nn.Module) -> dict[str, dict[str, StreamStats]]:
    """The stats of every `LiteAttention` in a model: by layer, as `lite_modules` names them, then by stream.

    Waits for the GPU.
    """
    return {name: module.stats() for name, module in lite_modules(model).items()}

"""Seeing the calls of a model's `LiteAttention` modules while they compute dense attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lite_attention.checks import wrong
from lite_attention.module import LiteAttention

FORWARD = inspect.signature(LiteAttention.forward)

Note = Callable[[str, dict[str, Any], Tensor], None]
"""Is told of a call: the layer, the arguments by name, and out."""


@contextmanager
def afresh(modules: dict[str, LiteAttention], *, skipping: bool) -> Iterator[None]:
    """The modules skip, or are dense, inside. Their streams start afresh before and after."""
    enabled = {layer: module.enable_skipping for layer, module in modules.items()}
    for module in modules.values():
        module.reset_skip_state()
        module.enable_skip_optimization(skipping)
    try:
        yield
    finally:
        for layer, module in modules.items():
            module.reset_skip_state()
            module.enable_skip_optimization(enabled[layer])


@contextmanager
def watched(modules: dict[str, LiteAttention], note: Note) -> Iterator[None]:
    """The modules are dense inside, and each of their calls is told to `note`."""

    def hook(layer: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor | tuple) -> None:
            call = FORWARD.bind(module, *args, **kwargs)
            call.apply_defaults()
            note(layer, call.arguments, output[0] if isinstance(output, tuple) else output)

        return after

    with afresh(modules, skipping=False), ExitStack() as handles:
        for layer, module in modules.items():
            handles.callback(module.register_forward_hook(hook(layer), with_kwargs=True).remove)
        yield


@dataclass
class Survey:
    """What a run calls. Of each layer: how many calls of each stream, and heads and head dim of q."""

    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)

    def note(self, layer: str, call: dict[str, Any], out: Tensor) -> None:
        heads = tuple(out.shape[2:])
        if self.heads.setdefault(layer, heads) != heads:
            raise wrong(
                "inputs", f"calls of {layer} with heads of {self.heads[layer]} and {heads}", "those of one kind"
            )
        streams = self.calls.setdefault(layer, {})
        streams[call["stream"]] = streams.get(call["stream"], 0) + 1

    def steps(self, modules: dict[str, LiteAttention]) -> int:
        """Calls that each stream makes of each module."""
        counts = {layer: set(self.calls.get(layer, {"": 0}).values()) for layer in modules}
        numbers = set.union(*counts.values())
        wanted = {module.num_steps for module in modules.values()} - {None}
        if len(numbers) != 1 or 0 in numbers or wanted - numbers:
            calls = {layer: self.calls.get(layer, {}) for layer in modules}
            want = f"num_steps={min(wanted)}" if wanted else "the same number"
            raise wrong("inputs", f"calls by layer and stream {calls}", f"{want} in every stream of every layer")
        return numbers.pop()

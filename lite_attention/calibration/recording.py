"""Calls of `LiteAttention` modules in a dense run, kept in host memory for some groups of heads at a time.

A run of a large model has terabytes of q, k and v. So a first run only notes shapes; then there are as many further
runs as it takes to hold all groups of heads within the memory that there is, a part of them each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lite_attention.checks import wrong
from lite_attention.module import LiteAttention

FORWARD = inspect.signature(LiteAttention.forward)


@dataclass(frozen=True)
class Unit:
    """Query heads [begin, end) of a module, with the KV heads that they read; `nbytes` of them in a whole run."""

    layer: str
    begin: int
    end: int
    kv_begin: int
    kv_end: int
    nbytes: int


@dataclass(frozen=True)
class Call:
    """A call of a module: its arguments and its dense output, of a unit's heads, on the CPU; `device` they were on."""

    stream: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    out: Tensor
    device: Any


@dataclass
class Survey:
    """What a dense run calls. Of each layer: calls of each stream, heads, and bytes of q, k, v and out of all calls."""

    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    heads: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # of q, of k, and their dim
    nbytes: dict[str, int] = field(default_factory=dict)

    def note(self, layer: str, call: dict[str, Any], out: Tensor) -> None:
        q, k, v = call["q"], call["k"], call["v"]
        heads = (q.shape[2], k.shape[2], q.shape[3])
        if self.heads.setdefault(layer, heads) != heads:
            raise wrong("inputs", f"calls of {layer} with {self.heads[layer]} and {heads} heads", "calls of one kind")
        streams = self.calls.setdefault(layer, {})
        streams[call["stream"]] = streams.get(call["stream"], 0) + 1
        self.nbytes[layer] = self.nbytes.get(layer, 0) + sum(x.nbytes for x in (q, k, v, out))

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

    def units(self, head_groups: int) -> list[Unit]:
        """Groups of whole KV heads: `head_groups` of each layer."""
        units = []
        for layer, (heads, kv_heads, _) in self.heads.items():
            if head_groups > kv_heads:
                raise wrong("head_groups", head_groups, f"at most the {kv_heads} KV heads of {layer}")
            bounds = [kv_heads * i // head_groups for i in range(head_groups + 1)]
            for begin, end in pairwise(bounds):
                share, ratio = self.nbytes[layer] * (end - begin) // kv_heads, heads // kv_heads
                units.append(Unit(layer, begin * ratio, end * ratio, begin, end, share))
        return units


def passes(units: Sequence[Unit], memory: int) -> list[list[Unit]]:
    """The units in their order, in runs that each hold at most `memory` bytes."""
    runs: list[list[Unit]] = []
    room = 0
    for unit in units:
        if unit.nbytes > memory:
            raise wrong("memory", memory, f"at least the {unit.nbytes} bytes of a head group of {unit.layer}")
        if unit.nbytes > room:
            runs.append([])
            room = memory
        runs[-1].append(unit)
        room -= unit.nbytes
    return runs


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
def watching(modules: dict[str, LiteAttention], note: Callable[[str, dict[str, Any], Tensor], None]) -> Iterator[None]:
    """Each call of the modules inside is told to `note`: the layer, the arguments by name, and out."""

    def hook(layer: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor | tuple) -> None:
            call = FORWARD.bind(module, *args, **kwargs)
            call.apply_defaults()
            note(layer, call.arguments, output[0] if isinstance(output, tuple) else output)

        return after

    with ExitStack() as handles:
        for layer, module in modules.items():
            handles.callback(module.register_forward_hook(hook(layer), with_kwargs=True).remove)
        yield


class Recorder:
    """The calls of some units."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.calls: dict[Unit, list[Call]] = {unit: [] for unit in units}

    def note(self, layer: str, call: dict[str, Any], out: Tensor) -> None:
        for unit, calls in self.calls.items():
            if unit.layer == layer:
                q, out_of_unit = (x[:, :, unit.begin : unit.end].detach().cpu().clone() for x in (call["q"], out))
                k, v = (x[:, :, unit.kv_begin : unit.kv_end].detach().cpu().clone() for x in (call["k"], call["v"]))
                options = {name: call[name] for name in ("scale", "must_do_list", "must_skip_list")}
                calls.append(Call(call["stream"], q, k, v, options, out_of_unit, call["q"].device))

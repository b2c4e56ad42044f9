"""LiteAttention in one transformer: its layers, and the stream that its calls belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from lite_attention.checks import wrong
from lite_attention.diffusers.backend import CALLS
from lite_attention.module import LiteAttention

DEFAULT_STREAM = "default"


class Session:
    """The streams of a transformer. All its parts are copied with the transformer by `copy.deepcopy`."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.layers: list[Layer] = []
        self.stream = DEFAULT_STREAM
        self.hook = transformer.register_forward_pre_hook(refuse_cache)
        self._last_step: dict[str, int] = {}

    def reset(self, stream: str | None = None) -> None:
        """Starts `stream` afresh, or all of them."""
        for layer in self.layers:
            layer.attention.reset_skip_state(stream)
        if stream is None:
            self._last_step.clear()
        else:
            self._last_step.pop(stream, None)

    @contextmanager
    def in_stream(self, name: str, step_index: int | None = None) -> Iterator[None]:
        """Calls inside belong to the stream `name`. A `step_index` that doesn't rise begins another prompt."""
        if step_index is not None:
            if step_index <= self._last_step.get(name, -1):
                self.reset(name)
            self._last_step[name] = step_index
        outer, self.stream = self.stream, name
        try:
            yield
        finally:
            self.stream = outer

    @contextmanager
    def cache_context(self, name: str, **where: object) -> Iterator[None]:
        """Stands before the transformer's own `cache_context`."""
        own = type(self.transformer).cache_context
        with own(self.transformer, name, **where), self.in_stream(name, where.get("step_index")):
            yield


def refuse_cache(transformer: nn.Module, *_: object) -> None:
    """Raises ValueError where a cache of diffusers is on: it leaves out calls of layers, by which these count steps."""
    if getattr(transformer, "is_cache_enabled", False):
        raise wrong("transformer", "one with a cache of diffusers", "one without: call its disable_cache")


class Layer:
    """One self-attention: the diffusers module, what computes it now, and what did before."""

    def __init__(self, session: Session, name: str, module: nn.Module, attention: LiteAttention) -> None:
        self.session = session
        self.name = name
        self.module = module
        self.attention = attention
        self.processor = module.processor
        self.dense_backend: AttentionBackendName | None = module.processor._attention_backend
        self.reached = False
        self.hooks = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave),
        )

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self.reached = False
        CALLS.layer = self

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        CALLS.layer = None
        if not self.reached:
            raise RuntimeError(
                f"{self.name} did not compute its attention with LiteAttention: since lite_attention.diffusers.enable "
                "its processor or backend was changed, or a cache or a guider skips it. Call disable before such a "
                "change and enable after it; caches that skip attention don't go with skip lists"
            )

"""Putting LiteAttention into a diffusers transformer, and taking it out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from lite_attention.checks import wrong
from lite_attention.diffusers.backend import BACKEND
from lite_attention.diffusers.session import Layer, Session, refuse_cache
from lite_attention.module import LiteAttention

SESSION = "_lite_attention_session"
CHILD = "lite_attention"


def enable(
    transformer: nn.Module,
    *,
    threshold: float = -10.0,
    num_steps: int | None = None,
    refresh_every: int | None = None,
    stats_steps: int = 0,
    tile: tuple[int, int] | None = None,
    layers: Callable[[str], bool] | None = None,
    backend: str | None = None,
) -> None:
    """Makes each self-attention of `transformer` compute with a `LiteAttention` of its own.

    Args:
        transformer: a diffusers model whose attention goes through diffusers' registry of backends, as those of Wan,
            Flux, LTX and most others do, without masks. Enable it before `torch.compile`.
        threshold, refresh_every, stats_steps, tile, backend: as in `LiteAttention`.
        num_steps: the calls that each stream makes for one prompt: the pipeline's num_inference_steps, for a scheduler
            that evaluates the model once a step. Of a pipeline with two transformers, such as Wan 2.2's, each makes
            only a part of them.
        layers: takes the name of an attention module, such as "blocks.0.attn1", and says whether it is to be one of
            them; None takes all. Modules that say themselves that they are cross-attention are never among them. In
            the others, a call whose keys and queries differ in number is taken for cross-attention and computed by
            the backend that was there before; those that make no other calls, as LTX's "attn2", are better left out,
            as `calibrate` wants calls of all.

    Raises:
        ValueError: LiteAttention is in already, there is no attention module for it, or a cache of diffusers is on.

    Calls of the transformer raise NotImplementedError for masks, dropout, causal attention and context parallelism, and
    ValueError once a cache of diffusers is on.
    """
    model = _uncompiled(transformer)
    if SESSION in model.__dict__:
        raise wrong("transformer", "one that LiteAttention is in", "one that it isn't in: call disable first")
    refuse_cache(model)
    chosen = {name: x for name, x in model.named_modules() if _is_self_attention(x) and (not layers or layers(name))}
    if not chosen:
        raise wrong(
            "transformer",
            f"{type(model).__name__}, without a self-attention module that " + ("layers takes" if layers else "fits"),
            "a model whose attention processors go through diffusers' registry of attention backends",
        )
    session = Session(model)
    for name, module in chosen.items():
        attention = LiteAttention(
            threshold=threshold,
            num_steps=num_steps,
            refresh_every=refresh_every,
            stats_steps=stats_steps,
            tile=tile,
            backend=backend,
            name=name,
        )
        session.layers.append(Layer(session, name, module, attention))
        processor = copy.copy(module.processor)  # which other modules may share
        processor._attention_backend = BACKEND
        module.set_processor(processor)
        module.add_module(CHILD, attention)
    setattr(model, SESSION, session)
    if hasattr(model, "cache_context"):
        model.cache_context = session.cache_context


def disable(transformer: nn.Module) -> None:
    """Takes LiteAttention out again: processors, backends and `cache_context` are those from before `enable`.

    Raises:
        ValueError: it isn't in.
    """
    session = _session(transformer)
    session.hook.remove()
    for layer in session.layers:
        for hook in layer.hooks:
            hook.remove()
        layer.module.set_processor(layer.processor)
        delattr(layer.module, CHILD)
    model = session.transformer
    model.__dict__.pop("cache_context", None)
    delattr(model, SESSION)


def reset(transformer: nn.Module, stream: str | None = None) -> None:
    """Makes all tiles be visited again: in `stream`, or in all. Needed where a prompt was left before its last step.

    Raises:
        ValueError: LiteAttention isn't in.
    """
    _session(transformer).reset(stream)


def stream(transformer: nn.Module, name: str) -> AbstractContextManager[None]:
    """A context in which the transformer's calls belong to the stream `name`.

    It is for transformers without `cache_context`, which does the same, and is what diffusers' pipelines use.

    Raises:
        ValueError: LiteAttention isn't in.
    """
    return _session(transformer).in_stream(name)


def _uncompiled(transformer: nn.Module) -> nn.Module:
    return getattr(transformer, "_orig_mod", transformer)


def _session(transformer: nn.Module) -> Session:
    session = _uncompiled(transformer).__dict__.get(SESSION)
    if session is None:
        raise wrong(
            "transformer", f"{type(transformer).__name__} without LiteAttention", "one that enable was called on"
        )
    return session


def _is_self_attention(module: nn.Module) -> bool:
    """An attention module whose processor takes a backend, and that doesn't call itself cross-attention."""
    takes_backend = hasattr(getattr(module, "processor", None), "_attention_backend")
    return takes_backend and hasattr(module, "set_processor") and not getattr(module, "is_cross_attention", False)

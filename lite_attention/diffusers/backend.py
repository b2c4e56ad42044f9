"""The attention backend `lite_attention` in diffusers' registry.

diffusers hands a backend the tensors and not the layer that they come from. So the layer's forward hooks say whose call
it is, a thread at a time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor

if TYPE_CHECKING:
    from lite_attention.diffusers.session import Layer

NAME = "lite_attention"


class _Calls(threading.local):
    layer: Layer | None = None
    """The layer whose forward is running in this thread."""


CALLS = _Calls()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: object | None = None,
) -> Tensor:
    """What the registry calls; q, k, v and the result are (batch, seqlen, heads, head_dim).

    Raises:
        NotImplementedError: masks, dropout, causal attention and context parallelism.
    """
    layer = CALLS.layer
    if layer is None:
        raise RuntimeError(
            "LiteAttention was called outside of the attention modules that lite_attention.diffusers.enable chose: "
            "call the modules, and not their processors, and don't choose the backend 'lite_attention' by name"
        )
    layer.reached = True
    if query.shape[1] != key.shape[1]:  # cross-attention in a module that doesn't say so, or an image prompt's keys
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            backend=layer.dense_backend,
            parallel_config=_parallel_config,
        )
    _refuse(layer, attn_mask, dropout_p, is_causal, _parallel_config)
    return layer.attention(query, key, value, scale=scale, stream=layer.session.stream)


def _refuse(
    layer: Layer, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, parallel_config: object | None
) -> None:
    for name, given, works in (
        ("attn_mask", None if attn_mask is None else f"a mask of {tuple(attn_mask.shape)}", None),
        ("dropout_p", dropout_p, 0.0),
        ("is_causal", is_causal, False),
        ("parallel_config", None if parallel_config is None else type(parallel_config).__name__, None),
    ):
        if given != works:
            raise NotImplementedError(
                f"{name}: got {given} in {layer.name}; LiteAttention in diffusers has only {name}={works}: leave this "
                "module out by layers=... of lite_attention.diffusers.enable"
            )


def _register() -> AttentionBackendName:
    """Adds the backend to the registry, and its name to diffusers' names.

    diffusers has a registry that is open and an enum of names that is closed: to take a name for a backend, it wants a
    member of the enum. A member that is in the enum's tables can also be copied and pickled with the model.
    """
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    setattr(AttentionBackendName, member.name, member)
    AttentionBackendName._member_map_[member.name] = AttentionBackendName._value2member_map_[NAME] = member
    AttentionBackendName._member_names_.append(member.name)
    _AttentionBackendRegistry.register(member)(attend)
    return member


BACKEND = _register()
